"""Names of runs: the one that a person gave, else one that tells runs apart."""

import os
from datetime import datetime
from functools import cache
from typing import Any
from uuid import UUID

import coolname.data
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext


class RunName(str):
    """A template for `flow_run_name`, filled with the parameters and `now`, that leaves a name given by a person.

    Prefect itself replaces the name that was typed into the form.
    """

    def format(self, *_: object, **parameters: Any) -> str:
        """Return the name of the run that starts."""
        return _given_name() or super().format(now=datetime.now(), **parameters)


def _given_name() -> str | None:
    """Return the name that the run of a deployment has, unless the server made it up or it is that of a run above."""
    run_id = os.environ.get("PREFECT__FLOW_RUN_ID")
    if run_id is None or FlowRunContext.get() is not None:
        return None
    with get_client(sync_client=True) as client:
        name = client.read_flow_run(UUID(run_id)).name
    words = name.split("-")
    return None if len(words) > 1 and _made_up_words().issuperset(words) else name


@cache
def _made_up_words() -> set[str]:
    """Return the words of names like lean-chimpanzee, from the library by which Prefect's server makes them up."""
    lists: dict[str, dict[str, Any]] = coolname.data.config
    return {word for entry in lists.values() for word in entry.get("words", ())}
