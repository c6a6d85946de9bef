"""The table at the end of the demo, read from what the run left in its workspace."""

from tasks.config import PipelineConfig
from tasks.demo.local import NOWHERE
from tasks.report.run import gather_manifests, read_quality
from tasks.run.preflight import report_uri
from tasks.store.measures import percent, read_evaluation
from tasks.store.workspace import Cost, PipelineResult, Row, Workspace


def show_result(result: PipelineResult, config: PipelineConfig) -> None:
    """Print what the run did and whether the adapter is better, and, after the first run, a scene before and after."""
    known = config.generation.endpoint == NOWHERE
    rows = [*summarise(result, config.workspace, short=known), ("report", report_uri(config))]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    if known:
        return
    row: Row = {}
    for row in Workspace(config.workspace).read_rows(result.evaluation.sibling("comparisons.jsonl")):
        if row["outcome"] == 1:  # the first that the new adapter won, if it won any
            break
    texts = {"scene": row["prompt"][-1]["content"]}
    texts |= dict(zip(("before (SFT)", "after (DPO)"), row["completions"], strict=True))
    for title, text in texts.items():
        print(f"\n{title}:\n" + "\n".join(f"    {line}" for line in text.splitlines()), flush=True)


def summarise(result: PipelineResult, workspace: str, short: bool = False) -> list[tuple[str, str]]:
    """Return (name, value) rows that tell what the run did and whether the adapter is better; `short`: the verdict."""
    store = Workspace(workspace)
    pairs = store.read_manifest(result.preferences).counts
    training = store.read_manifest(result.adapter).figures
    found, served = read_evaluation(result.evaluation), "none: it did not win by enough"
    null, rate = found.null, f"{found.text()} at {percent(found.confidence, '.3g')}"
    if result.promotion is not None:
        served = f"{result.promotion.adapter_sha256[:12]} as {result.promotion.name!r}"
    verdict = [
        ("win rate", f"{rate}, {found.samples} samples of {found.prompts} held-out prompts"),
        ("SFT against itself", f"{null.text()} at {percent(null.confidence, '.3g')}" if null else "not asked"),
        ("adapter served", served),
    ]
    if short:
        return verdict
    # The largest excess of a position's share of the bests over chance.
    detail = read_quality(store, result.preferences).metric("position_best").detail
    worst = max(detail["positions"], key=lambda row: abs(row["rate"] - row["chance"]))
    lift = 100 * (worst["rate"] - worst["chance"])
    used = sum((manifest.cost for manifest in gather_manifests(store, *result.references())), Cost())
    return [
        ("prompts", f"{result.completions.rows if result.completions else 0}"),
        ("pairs", f"{pairs['train']} to train, {pairs['val']} held out"),
        ("position lift", f"{lift:+.1f} points at position {worst['position']} (p {detail['p_value']:.2f})"),
        ("first loss", f"{training['first_loss']:.4f} (ln 2 = 0.6931)"),
        ("eval accuracy", f"{training['eval_rewards/accuracies']:.3f}"),
        ("eval margin", f"{training['eval_rewards/margins']:.3f}"),
        *verdict,
        ("tokens", f"{used.prompt_tokens:,} in, {used.completion_tokens:,} out, {used.requests:,} requests"),
    ]
