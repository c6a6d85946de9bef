"""What a run shows: Prefect artifacts of each stage, and one self-contained HTML page of the whole."""

import logging
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from prefect.artifacts import acreate_markdown_artifact
from pydantic import ValidationError

from tasks.batch.costs import StageCost, add_up, format_seconds, format_usd
from tasks.config import PipelineConfig, StageConfig
from tasks.errors import PreflowError
from tasks.report import sections as parts
from tasks.report.overview import glance_section, inputs_section, run_figures
from tasks.report.page import ReportSection, Table
from tasks.report.render import render_html, render_markdown
from tasks.store.measures import Choice, Health, QualityReport, read_choice, read_evaluation
from tasks.store.workspace import (
    MANIFEST,
    AdapterRef,
    ChoiceRef,
    EvaluationRef,
    Manifest,
    Origin,
    PipelineResult,
    PreferencesRef,
    Workspace,
)

AGAIN = "run the pipeline again with the same settings: what was paid for is kept, and found"
logger = logging.getLogger(__name__)


async def publish(*sections: ReportSection) -> None:
    """Show sections in the UI, each as a markdown artifact named after its title."""
    for section in sections:
        key = section.title.lower().replace(" ", "-")
        await acreate_markdown_artifact(key=key, markdown=render_markdown(section), description=section.summary)


async def report_run(config: PipelineConfig, result: PipelineResult, folder: str) -> str:
    """Write the page of a whole run into its folder, show it in the UI, and return its uri."""
    sections = run_sections(config, result)
    uri = write_report(config, sections, folder)
    await publish(*sections[-2:])  # cost and lineage; the others are pages of their stages already
    whole = "\n".join(render_markdown(replace(section, blocks=())) for section in sections)
    page = f"The same page, to keep or to print: `{uri}`\n\n{whole}"
    # Last, because the UI shows the newest page of a run first.
    await acreate_markdown_artifact(key="report", markdown=page, description=sections[0].summary)
    logger.info("%s The whole report: %s", sections[0].summary, uri)
    return uri


def write_report(config: PipelineConfig, sections: Sequence[ReportSection], folder: str) -> str:
    """Write the page of a whole run into its folder, and return its uri."""
    uri = posixpath.join(folder, "report.html")
    page = render_html(f"preflow run for {config.promotion.name}", sections)
    Workspace(config.workspace).write_bytes(uri, page.encode())
    return uri


def run_sections(config: PipelineConfig, result: PipelineResult) -> list[ReportSection]:
    """Return every page on a run: first the verdict, then what shows it, then how it came about.

    Raises:
        PreflowError: a file that is shown is gone, or of another version.
    """
    store, bar = Workspace(config.workspace), config.promotion.min_win_rate
    manifests = gather_manifests(store, *result.references())
    try:
        found, choice = read_evaluation(result.evaluation), read_choice(result.evaluation)
        trained = store.read_manifest(result.adapter).figures if result.adapter.manifest else {}
        quality, health = read_quality(store, result.preferences), _read_health(store, result.adapter)
        shown = [
            evaluation_page(result.evaluation, store.root, bar),
            *([parts.choice_section(choice)] if choice else []),
            *preference_sections(result.preferences, store.root),
            training_page(result.adapter, store.root),
        ]
    except FileNotFoundError as error:
        raise PreflowError(f"{error.filename}: missing, and the report shows it; {AGAIN}") from error
    except ValidationError as error:
        raise PreflowError(f"{error.title}: not as this version of preflow writes it; {AGAIN}") from error
    if result.promotion is not None:
        served = f"Adapter {result.promotion.adapter_sha256[:12]} is served as {result.promotion.name!r}."
    else:
        served = f"It is not served: {result.declined.rstrip('.')}." if result.declined else "It is not served."
    costs = add_up(manifests)
    glance = glance_section(found, bar, served, run_figures(found, bar, quality, health, trained), shown)
    return [
        replace(glance, tables=(_facts(config, result, costs[-1]), *glance.tables)),
        inputs_section(manifests, dict(changed_settings(config, PipelineConfig()))),
        *shown,
        parts.cost_section(costs, has_prices(config)),
        parts.lineage_section(manifests, store.root),
    ]


def has_prices(config: PipelineConfig) -> bool:
    """Tell whether any judge has a price: without one, no sum of money is known."""
    return any(judge.prompt_price or judge.completion_price for judge in config.judging.judges())


def _facts(config: PipelineConfig, result: PipelineResult, total: StageCost) -> Table:
    unknown = "not known: prompt_price and completion_price are not set"
    *folders, model = config.training.base_model.strip("/").split("/")
    facts = (
        ("Base model", "/".join([*("…" for _ in folders[1:2]), *folders[-1:], model])),
        ("New adapter", result.adapter.sha256[:12]),
        ("Judge", ", ".join(judge.model for judge in config.judging.judges())),
        ("Prompts sampled", f"{result.completions.rows:,}" if result.completions else "none: pairs were given"),
        ("Preference pairs", f"{result.preferences.rows:,} to train, {result.preferences.val_rows:,} held out"),
        ("Time of all stages", format_seconds(total.seconds)),
        ("Cost, US$", format_usd(total.used.usd) if has_prices(config) or total.used.usd else unknown),
    )
    return Table("The run", ("what", "value"), facts)


def changed_settings(given: StageConfig, defaults: StageConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings that decide the outcome and differ from their defaults, by their dotted names.

    Addresses, limits and prices are left out: a cached run was made with those of then, not with these.
    """
    for name in given.identity():
        value, default = getattr(given, name), getattr(defaults, name)
        if isinstance(value, StageConfig) and isinstance(default, StageConfig):
            yield from changed_settings(value, default, f"{prefix}{name}.")
        # The evaluation's endpoints are those of the stages before, written out.
        elif value != default and not isinstance(value, StageConfig):
            yield f"{prefix}{name}", given.model_dump(mode="json")[name]


def preference_sections(preferences: PreferencesRef, workspace: str) -> list[ReportSection]:
    """Return the sections on the judge's quality and on the pairs."""
    store = Workspace(workspace)
    pairs = parts.sample_rows(row for row in store.read_rows(preferences.uri) if not row.get("sft_only"))
    return [parts.quality_section(read_quality(store, preferences)), parts.pairs_section(pairs)]


def read_quality(store: Workspace, preferences: PreferencesRef) -> QualityReport:
    """Return what was measured about the judge and its pairs."""
    return QualityReport.model_validate(store.read_json(preferences.sibling("quality.json")))


def _read_health(store: Workspace, adapter: AdapterRef) -> Health:
    """Return the readings of a training."""
    return Health.model_validate(store.read_json(adapter.sibling("health.json")))


def training_page(adapter: AdapterRef, workspace: str) -> ReportSection:
    """Return the section on a training: its curves, its readings and the advice."""
    store = Workspace(workspace)
    metrics = list(store.read_rows(adapter.sibling("metrics.jsonl")))
    counts = store.read_manifest(adapter).counts if adapter.manifest else {}
    return parts.training_section(_read_health(store, adapter), metrics, counts)


def evaluation_page(evaluation: EvaluationRef, workspace: str, bar: float) -> ReportSection:
    """Return the section on the win rate, with comparisons to read."""
    store, comparisons = Workspace(workspace), evaluation.sibling("comparisons.jsonl")
    lengths = parts.sample_lengths(store.read_rows(comparisons))
    return parts.evaluation_section(
        read_evaluation(evaluation), parts.sample_rows(store.read_rows(comparisons)), bar, lengths
    )


def choice_page(choice: ChoiceRef) -> ReportSection:
    """Return the section on the checkpoints of a training."""
    return parts.choice_section(Choice.model_validate(Workspace.holding(choice.uri).read_json(choice.uri)))


def gather_manifests(store: Workspace, *references: Origin) -> list[Manifest]:
    """Return the manifests of artifacts and of all that these were made of, each once and after what it was made of."""
    found: dict[str, Manifest] = {}

    def visit(origin: Origin) -> None:
        uri = origin.manifest
        if uri is None or uri in found or not store.exists(uri):
            return
        manifest = store.read_manifest(uri)
        for upstream in manifest.upstream:
            visit(upstream)
        found[uri] = _with_origin(store, manifest) if manifest.stage == "prompts" else manifest

    for reference in references:
        visit(reference)
    return list(found.values())


def _with_origin(store: Workspace, manifest: Manifest) -> Manifest:
    """Return the manifest of prompts with the file that they came from in the end, and all that was left out."""
    source, *others = manifest.upstream
    before = posixpath.join(posixpath.dirname(source.uri), MANIFEST)
    if not source.uri.startswith(store.uri("prompts")) or not store.exists(before):
        return manifest
    origin = _with_origin(store, store.read_manifest(before))
    left_out = {name: manifest.counts[name] + origin.counts[name] for name in ("duplicates", "in_training")}
    counts = {"read": origin.counts["read"], **left_out}
    return manifest.model_copy(update={"upstream": (origin.upstream[0], *others), "counts": counts})
