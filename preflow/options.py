"""Arguments that several sub-commands have."""

from pathlib import Path
from typing import Annotated, TypeAlias

from cyclopts import Parameter
from cyclopts.validators import Number

from tasks.errors import PreflowError

CONFIG = Path("config.yaml")
File: TypeAlias = Annotated[Path, Parameter(help="The configuration.")]
_SET = Parameter("--set", negative=(), show_default=False)
Changes: TypeAlias = Annotated[
    tuple[str, ...], _SET, Parameter(help="A setting to change, such as training.beta=0.05; may be given again.")
]
TrainingChanges: TypeAlias = Annotated[
    tuple[str, ...], _SET, Parameter(help="A setting of the training to change, such as beta=0.05; may be given again.")
]
Made: TypeAlias = Annotated[tuple[str, ...], _SET, Parameter(help="A change that the run was made with.")]
Switch: TypeAlias = Annotated[bool, Parameter(negative=(), show_default=False)]
Folder: TypeAlias = Annotated[Path, Parameter(help="Where the demo is kept.")]
Port: TypeAlias = Annotated[int, Parameter(validator=Number(gte=1, lte=65535))]
UiPort: TypeAlias = Annotated[Port, Parameter(env_var="UI_PORT", help="Port of Prefect's UI.")]
VllmPort: TypeAlias = Annotated[Port, Parameter(env_var="VLLM_PORT", help="Port of the demo's vLLM.")]
JudgePort: TypeAlias = Annotated[Port, Parameter(env_var="JUDGE_PORT", help="Port of the demo's judge.")]
On: TypeAlias = Annotated[
    str | None,
    Parameter(help="Run it as this deployment, such as dpo-pipeline/local, and follow it; else in this process."),
]
Run: TypeAlias = Annotated[str, Parameter(help="A finished run: its config.yaml, or its folder in the workspace.")]


def write_file(path: Path, content: bytes) -> None:
    """Write a file that the user named, in a folder that need not be there yet.

    Raises:
        PreflowError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise PreflowError(f"{path}: cannot be written: {error.strerror}; give another name") from error
