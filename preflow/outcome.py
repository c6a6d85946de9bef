"""How a run ended, in a few lines."""

from preflow.cli import Exit
from tasks.config import PipelineConfig
from tasks.run.preflight import report_uri
from tasks.store.workspace import PipelineResult


def tell(config: PipelineConfig, result: PipelineResult, report: str | None = None) -> Exit:
    """Print the verdict and where the report is (None: where these settings have it), and return the exit code."""
    found, bar = result.evaluation, config.promotion.min_win_rate
    rate = f"it wins {found.win_rate:.1%} of the comparisons [{found.lower:.1%}, {found.upper:.1%}]"
    if result.promotion is not None:
        print(f"better: {rate}; {result.promotion.adapter_sha256[:12]} is served as {result.promotion.name}")
    elif result.declined:
        print(f"not served: {rate}; {result.declined}")
    else:
        print(f"not proven better: {rate}, and the lower bound is not over {bar:.0%}; what was served still is")
    print(f"report: {report or report_uri(config.filled())}")
    return Exit.DONE if result.promotion is not None else Exit.NOT_BETTER
