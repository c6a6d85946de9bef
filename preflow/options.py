"""Arguments that several sub-commands have."""

from pathlib import Path
from typing import Annotated, TypeAlias

from cyclopts import Parameter

CONFIG = Path("config.yaml")
File: TypeAlias = Annotated[Path, Parameter(help="The configuration.")]
Changes: TypeAlias = Annotated[
    tuple[str, ...],
    Parameter(
        "--set",
        negative=(),
        show_default=False,
        help="A setting to change, such as training.beta=0.05; may be given again.",
    ),
]
Switch: TypeAlias = Annotated[bool, Parameter(negative=(), show_default=False)]
Folder: TypeAlias = Annotated[Path, Parameter(help="Where the demo is kept.")]
On: TypeAlias = Annotated[
    str | None,
    Parameter(help="Run it as this deployment, such as dpo-pipeline/local, and follow it; else in this process."),
]
Run: TypeAlias = Annotated[str, Parameter(help="A finished run: its config.yaml, or its folder in the workspace.")]
