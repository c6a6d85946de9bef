"""A run that has finished, by the configuration or the folder of it that a person names."""

import posixpath
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from preflow.settings import load_settings
from tasks.config import PipelineConfig
from tasks.errors import PreflowError
from tasks.run.preflight import CONFIG, RESULT, find_result, run_folder
from tasks.store.workspace import PipelineResult, Workspace


def find_run(run: str, changes: Sequence[str] = ()) -> tuple[PipelineConfig, PipelineResult, str]:
    """Return the configuration, the result and the folder of a run.

    Args:
        run: its config.yaml, or its folder `<workspace>/runs/<key>`.
        changes: the changes that it was made with.

    Raises:
        PreflowError: no such run has finished.
    """
    store = Workspace(run)
    if store.exists(store.uri(RESULT)):
        try:
            config = PipelineConfig.model_validate(store.read_json(store.uri(CONFIG)))
            return config, PipelineResult.model_validate(store.read_json(store.uri(RESULT))), store.root
        except (FileNotFoundError, ValidationError) as error:
            raise PreflowError(
                f"{posixpath.join(run, CONFIG)}: not there, or of another version: name the run's config.yaml"
            ) from error
    if Path(run).is_dir():
        raise PreflowError(f"{run}: holds no finished run; name its folder, <workspace>/runs/<key>, or its config.yaml")
    config = load_settings(Path(run), changes).config.filled()
    result = find_result(config)
    if result is None:
        raise PreflowError(f"no run with the settings of {run} has finished: preflow run {run}")
    return config, result, run_folder(config)
