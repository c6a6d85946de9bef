"""What a run shows: Prefect artifacts of each stage, and one self-contained HTML page of the whole."""

import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

from prefect.artifacts import acreate_markdown_artifact

from tasks.config import PipelineConfig
from tasks.ledger import Ledger, Spent, StageCost
from tasks.quality import QualityReport
from tasks.reporting import (
    ReportSection,
    cost_section,
    evaluation_section,
    lineage_section,
    pairs_section,
    quality_section,
    render_html,
    render_markdown,
    sample_rows,
    training_section,
)
from tasks.runs import PipelineResult, run_key
from tasks.storage import AdapterRef, EvaluationRef, PreferencesRef, Reference, Workspace
from tasks.training.plots import plot_metrics


async def report_preferences(preferences: PreferencesRef, workspace: str) -> None:
    """Show in the UI what was measured about the judge, and pairs to read."""
    for section in preference_sections(preferences, workspace):
        await publish(section)


async def report_training(adapter: AdapterRef, workspace: str) -> None:
    """Show in the UI the curves of a training, its readings and the advice."""
    await publish(training_page(adapter, workspace))


async def report_evaluation(evaluation: EvaluationRef, workspace: str, bar: float = 0.5) -> None:
    """Show in the UI whether the adapter won, and comparisons to read."""
    await publish(evaluation_page(evaluation, workspace, bar))


async def report_run(config: PipelineConfig, result: PipelineResult) -> str:
    """Write the page of a whole run into the workspace, and return its uri."""
    sections = run_sections(config, result)
    for section in sections[-2:]:
        await publish(section)
    uri = report_uri(config)
    Workspace(config.workspace).write_bytes(uri, render_html(f"preflow: {config.promotion.name}", sections).encode())
    return uri


def run_sections(config: PipelineConfig, result: PipelineResult) -> list[ReportSection]:
    """Return what the page of a run consists of; cost and lineage come last."""
    manifests = gather_manifests(Workspace(config.workspace), result)
    return [
        evaluation_page(result.evaluation, config.workspace, config.promotion.min_win_rate),
        *preference_sections(result.preferences, config.workspace),
        training_page(result.adapter, config.workspace),
        cost_section(add_up(manifests)),
        lineage_section(manifests),
    ]


def report_uri(config: PipelineConfig) -> str:
    """Return where the page of a run lies."""
    return Workspace(config.workspace).uri("runs", run_key(config), "report.html")


async def publish(section: ReportSection) -> None:
    """Show a section in the UI, as a markdown artifact named after its title."""
    key = section.title.lower().replace(" ", "-")
    await acreate_markdown_artifact(key=key, markdown=render_markdown(section), description=section.summary)


def preference_sections(preferences: PreferencesRef, workspace: str) -> list[ReportSection]:
    """Return the sections on the judge's quality and on the pairs."""
    store = Workspace(workspace)
    quality = QualityReport.model_validate(store.read_json(beside(preferences, "quality.json")))
    picture = store.read_bytes(beside(preferences, "quality.png"))
    return [quality_section(quality, picture), pairs_section(sample_rows(_rows(store, preferences.uri)))]


def training_page(adapter: AdapterRef, workspace: str) -> ReportSection:
    """Return the section on a training."""
    store = Workspace(workspace)
    folder = posixpath.dirname(adapter.uri)
    metrics = list(_rows(store, posixpath.join(folder, "metrics.jsonl")))
    return training_section(store.read_json(posixpath.join(folder, "health.json")), metrics, plot_metrics(metrics))


def evaluation_page(evaluation: EvaluationRef, workspace: str, bar: float) -> ReportSection:
    """Return the section on the win rate."""
    store = Workspace(workspace)
    comparisons = sample_rows(_rows(store, beside(evaluation, "comparisons.jsonl")))
    return evaluation_section(store.read_json(evaluation.uri), comparisons, bar)


def beside(reference: Reference, name: str) -> str:
    """Return the uri of a file in the folder of an artifact."""
    return posixpath.join(posixpath.dirname(reference.uri), name)


def _rows(store: Workspace, uri: str) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in store.lines(uri))


def gather_manifests(store: Workspace, *results: PipelineResult) -> list[dict[str, Any]]:
    """Return the manifests of everything that runs were made of, each once, the earliest first."""
    found: dict[str, dict[str, Any]] = {}
    waiting = [ref.manifest for result in results for ref in reversed(result.references()) if ref.manifest]
    while waiting:
        uri = waiting.pop(0)
        if uri not in found and store.exists(uri):
            found[uri] = store.read_json(uri)
            waiting += [ref["manifest"] for ref in found[uri].get("upstream", []) if ref.get("manifest")]
    return list(reversed(found.values()))


def add_up(manifests: Sequence[dict[str, Any]]) -> Ledger:
    """Return what the artifacts of a run cost to make, whichever run made them, at the prices of then."""
    ledger = Ledger()
    for manifest in manifests:
        if usage := manifest.get("usage"):
            spent = Spent(**usage, usd=manifest["usd"])
            ledger = ledger.plus(StageCost(stage=manifest["stage"], used=spent))
    return ledger
