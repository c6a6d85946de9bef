"""A run that has finished: found by what a person names, and how it ended, in a few lines."""

import posixpath
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from preflow.cli import Exit
from preflow.settings import load_settings
from tasks.config import PipelineConfig
from tasks.errors import PreflowError
from tasks.run.preflight import CONFIG, RESULT, find_result, report_uri, run_folder
from tasks.store.measures import percent, percent_range, read_evaluation
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


def tell(config: PipelineConfig, result: PipelineResult, report: str | None = None) -> Exit:
    """Print the verdict and where the report is (None: where these settings have it), and return the exit code."""
    found, promotion = result.evaluation, config.promotion
    rate = f"it wins {percent(found.win_rate)} of the comparisons ({percent_range(found.lower, found.upper)})"
    if result.promotion is not None:
        print(f"better: {rate}; {result.promotion.adapter_sha256[:12]} is served as {result.promotion.name}")
    elif result.declined:
        print(f"not served: {rate}; {result.declined}")
    else:
        refusal = read_evaluation(found).refusal(promotion.min_win_rate, promotion.min_agreement)
        print(f"not proven better, what was served still is: {refusal or rate}")
    print(f"report: {report or report_uri(config.filled())}")
    return Exit.DONE if result.promotion is not None else Exit.NOT_BETTER
