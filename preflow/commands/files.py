"""The configuration and the files of data: `preflow init`, `schema`, `params`, `convert`."""

import json
from collections import Counter
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from preflow.options import CONFIG, Changes, File, Switch, write_file
from preflow.settings import RunFile, load_settings
from tasks.errors import PreflowError

Kind = Literal["prompts", "completions", "preferences"]
BEGINS = {"completions": "judging", "preferences": "training"}


def init(file: File = CONFIG, /, *, force: Switch = False) -> None:
    """Write a commented config.yaml, with four lines to change, its schema, and a rubric to edit.

    Parameters
    ----------
    file
        Where it goes; rubric.md and preflow.schema.json go into the same folder.
    force
        Write over files that are there.
    """
    texts: dict[Path, str] = {
        file: files("preflow").joinpath("config.yaml").read_text(encoding="utf-8"),
        file.with_name("rubric.md"): files("preflow").joinpath("rubric.md").read_text(encoding="utf-8"),
        file.with_name("preflow.schema.json"): json.dumps(RunFile.model_json_schema(), indent=1),
    }
    for path in texts:
        if path.exists() and not force and path.name != "preflow.schema.json":
            raise PreflowError(f"{path} is there already: give another name, or --force to write over it")
    for path, text in texts.items():
        write_file(path, text.encode())
    print(f"wrote {', '.join(map(str, texts))}")
    print(f"Change the four lines marked (1) to (4) in {file}, then: preflow check {file}")


def schema() -> None:
    """Print the JSON schema of config.yaml: every setting with its meaning, unit, bounds and default."""
    print(json.dumps(RunFile.model_json_schema(), indent=1))


def params(file: File = CONFIG, /, *, sweep: Switch = False, changes: Changes = ()) -> None:
    """Print a configuration as the parameters of dpo-pipeline, or of dpo-sweep.

    prefect deployment run dpo-pipeline/local --params "$(preflow params config.yaml)"

    Parameters
    ----------
    sweep
        For dpo-sweep: its `sweep` too.
    """
    print(json.dumps(load_settings(file, changes).parameters(sweep=sweep)))


def convert(
    file: str, /, *, kind: Kind = "prompts", show: Annotated[int, Parameter(validator=Number(gte=0))] = 1
) -> None:
    """Show how preflow reads a file of yours: the forms found, and rows as they are understood.

    Parameters
    ----------
    file
        JSONL, JSON, CSV, TSV or parquet, plain or .gz, or a folder saved by `datasets`.
    kind
        What the rows are.
    show
        Rows to print.
    """
    from tasks.config import resolve_location
    from tasks.store.records import CompletionsRow, KeepingRow, PairRow, PromptRow, number_rows
    from tasks.store.workspace import Workspace

    uri, forms = resolve_location(file), Counter[str]()
    models: dict[Kind, type[KeepingRow]] = {
        "prompts": PromptRow, "completions": CompletionsRow, "preferences": PairRow,
    }  # fmt: skip
    rows = number_rows(models[kind], uri, Workspace.holding(uri), forms)
    for place, row in islice(rows, show):
        print(place)
        print(json.dumps(row.model_dump(exclude_none=True), ensure_ascii=False, indent=1))
    for _ in rows:
        pass
    print(f"{sum(forms.values()):,} rows: {', '.join(f'{count:,} {form}' for form, count in forms.items())}")
    then = f": the run then begins at {BEGINS[kind]}." if kind in BEGINS else " as it is: it is read in this form."
    print(f"Give the file as `{kind}` in config.yaml{then}")
