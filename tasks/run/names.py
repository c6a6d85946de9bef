"""Names of runs: the one that a person gave, else one that tells runs apart."""

import re
from collections.abc import Callable
from datetime import datetime
from functools import cache
from typing import cast

import coolname.data
from prefect.context import FlowRunContext

# What the custom run's form of the UI (Prefect 3.8) opens with: one of its adjectives and a dish of up to six letters.
FORM_NAME = re.compile(
    r"(Awesome|Rustic|Small|Gorgeous|Fantastic|Sleek|Intelligent|Unbranded|Refined|Licensed|Generic|Practical|Ergonomic"
    r"|Handcrafted|Tasty|Handmade|Incredible)-.{1,6}$"
)


def named(template: str) -> Callable[[], str]:
    """Return a `flow_run_name` that fills a template with the run's parameters and `now`, unless a person gave a name.

    Prefect itself replaces the name that was typed into the form.
    """

    def name() -> str:
        context = FlowRunContext.get()
        if context is None or context.flow_run is None:
            raise RuntimeError("a run is named while it starts, by Prefect")
        given = context.flow_run.name
        words = given.split("-")
        # Nobody typed lean-chimpanzee, which the server makes up, or Rustic-Pizza, which the form does.
        if FORM_NAME.match(given) or (len(words) > 1 and _made_up_words().issuperset(words)):
            return template.format(now=datetime.now(), **(context.parameters or {}))
        return given

    return name


@cache
def _made_up_words() -> set[str]:
    """Return the words that such names are made of, from the library that Prefect takes."""
    lists = cast(dict[str, dict[str, list[str]]], coolname.data.config)
    return {word for entry in lists.values() for word in entry.get("words", ())}
