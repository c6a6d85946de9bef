"""`preflow convert`."""

import json
from collections import Counter
from itertools import islice
from typing import Literal

Kind = Literal["prompts", "completions", "preferences"]
NEXT = {
    "prompts": "Give the file as `prompts` in config.yaml as it is: it is read in this form.",
    "completions": "Give the file as `completions` in config.yaml: the run then begins at judging.",
    "preferences": "Give the file as `preferences` in config.yaml: the run then begins at training.",
}


def convert(file: str, /, *, kind: Kind = "prompts", show: int = 1) -> None:
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
    print(NEXT[kind])
