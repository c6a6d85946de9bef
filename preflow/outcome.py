"""How a run ended, in a few lines."""

from preflow.cli import Exit
from tasks.config import PipelineConfig
from tasks.run.preflight import report_uri
from tasks.store.measures import percent, percent_range, read_evaluation
from tasks.store.workspace import PipelineResult


def tell(config: PipelineConfig, result: PipelineResult, report: str | None = None) -> Exit:
    """Print the verdict and where the report is (None: where these settings have it), and return the exit code."""
    found = result.evaluation
    rate = f"it wins {percent(found.win_rate)} of the comparisons ({percent_range(found.lower, found.upper)})"
    if result.promotion is not None:
        print(f"better: {rate}; {result.promotion.adapter_sha256[:12]} is served as {result.promotion.name}")
    elif result.declined:
        print(f"not served: {rate}; {result.declined}")
    else:
        measured = read_evaluation(found)
        promotion = config.promotion
        refusal = measured.refusal(promotion.min_win_rate, promotion.min_agreement)
        print(f"not proven better, what was served still is: {refusal or rate}")
    print(f"report: {report or report_uri(config.filled())}")
    return Exit.DONE if result.promotion is not None else Exit.NOT_BETTER
