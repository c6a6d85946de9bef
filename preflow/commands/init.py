"""`preflow init`."""

import json
from importlib.resources import files

from preflow.options import CONFIG, File, Switch
from tasks.errors import PreflowError


def init(file: File = CONFIG, /, *, force: Switch = False) -> None:
    """Write a commented config.yaml, with four lines to change, its schema, and a rubric to edit.

    Parameters
    ----------
    file
        Where it goes; rubric.md and preflow.schema.json go into the same folder.
    force
        Write over files that are there.
    """
    from preflow.settings import RunFile

    texts = {
        file: files("preflow").joinpath("config.yaml").read_text(encoding="utf-8"),
        file.with_name("rubric.md"): files("preflow").joinpath("rubric.md").read_text(encoding="utf-8"),
        file.with_name("preflow.schema.json"): json.dumps(RunFile.model_json_schema(), indent=1),
    }
    for path in texts:
        if path.exists() and not force and path.name != "preflow.schema.json":
            raise PreflowError(f"{path} is there already: give another name, or --force to write over it")
    file.parent.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    print(f"wrote {', '.join(map(str, texts))}")
    print(f"Change the four lines marked (1) to (4) in {file}, then: preflow check {file}")
