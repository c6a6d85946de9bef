"""What is measured about a judge and its pairs: a table of metrics, each with its range and what to do outside it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.judge.quality.tally import NGRAMS, OTHER, Tally
from tasks.store.measures import Metric, QualityReport

BINS = 40


class Finding(NamedTuple):
    """What a measurement came to; `ok` and `advice` are None where there is nothing to compare it with."""

    value: float | None
    ok: bool | None = None
    advice: str | None = None
    detail: Mapping[str, Any] = MappingProxyType({})


class MetricSpec(NamedTuple):
    """One measurement: its name, the range it should lie in, and how it is found (None: not in these rows)."""

    name: str
    title: str
    unit: str | None
    healthy: str
    find: Callable[[Tally], Finding | None]

    def measure(self, tally: Tally) -> Metric | None:
        """Return the metric; its advice only where it is out of range, or could not be measured."""
        found = self.find(tally)
        if found is None:
            return None
        return Metric(
            name=self.name,
            title=self.title,
            unit=self.unit,
            healthy=self.healthy,
            value=None if found.value is None else short(found.value),
            ok=found.ok,
            advice=None if found.ok else found.advice,
            detail=dict(found.detail),
        )


def short(value: float) -> float:
    """Return `value` to 6 significant digits, as it stands in a report."""
    return float(f"{value:.6g}")


def percent(share: float) -> str:
    """Return a share in percent, for a sentence."""
    return f"{100 * share:.3g} %"


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a share (Wilson 1927); `total` must be at least 1."""
    from scipy.stats import binomtest  # here and below: scipy takes a second to import, and flows must start at once

    interval = binomtest(successes, total).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


def at_most(part: int, whole: int, limit: float, advice: str, **detail: Any) -> Finding:
    """Return the finding that a share should be at most `limit`."""
    if not whole:
        return Finding(None, detail=detail)
    return Finding(part / whole, part / whole <= limit, advice, detail)


# ---- rows


def find_yield(tally: Tally) -> Finding:
    """Return the share of prompts that gave a pair, with advice by the most frequent reason why not."""
    share = tally.pairs / tally.rows if tally.rows else None
    reason = next(iter(tally.reasons), "") if not tally.reasons else tally.reasons.most_common(1)[0][0]
    advice = f"Only {tally.pairs:,} of {tally.rows:,} prompts gave a pair, most often because of: {reason or '?'}. "
    if "unanimous" in reason or "majority" in reason:
        advice += (
            "The judge changes its mind with the order: take a stronger judging.model or a sharper judging.rubric, "
            "make the extremes clearer with a higher generation.num_completions or temperature; "
            "judging.pair_policy majority or borda keeps more pairs, of less certain ones."
        )
    elif "confidence" in reason:
        advice += "Lower judging.min_confidence, or raise generation.num_completions so that the extremes differ."
    elif "distinct" in reason:
        advice += "The completions are equal: raise generation.temperature and generation.num_completions."
    else:
        advice += "Look at `reason` and `votes` in judged.jsonl."
    return Finding(share, None if share is None else share >= 0.3, advice, {"statuses": dict(tally.statuses)})


def find_failed(tally: Tally) -> Finding:
    """Return the share of prompts that could not be judged."""
    failed = tally.statuses["failed"]
    advice = (
        f"{failed:,} prompts could not be judged: `votes[].error` in judged.jsonl says why. Where verdicts were cut, "
        "raise judging.max_tokens; where the endpoint refused, look at its limits. Run again: only these are asked."
    )
    return at_most(failed, tally.rows, 0.01, advice, failed=failed)


def find_unreadable(tally: Tally) -> Finding:
    """Return the share of verdicts that could not be read; those the endpoint refused are counted apart."""
    refused = sum(count for error, count in tally.errors.items() if error.startswith("refused"))
    failures = tally.errors.total() - refused
    advice = (
        "Verdicts could not be read. Raise judging.max_tokens (a thinking model spends them before it answers) or "
        "judging.max_attempts, or take a judging.model that follows a JSON schema."
    )
    errors = dict(tally.errors.most_common(10))
    return at_most(
        failures, tally.votes, 0.01, advice, failures=failures, refused=refused, votes=tally.votes, errors=errors
    )


def find_usage(tally: Tally) -> Finding:
    """Return the tokens a verdict took."""
    usage = {name: tally.usage[f"{name}_tokens"] for name in ("prompt", "completion", "thinking")}
    value = (usage["prompt"] + usage["completion"]) / len(tally.unit) if len(tally.unit) and tally.usage else None
    return Finding(value, detail={**usage, "requests": tally.usage["requests"], "verdicts": len(tally.unit)})


# ---- the judge


def find_positions(side: str) -> Callable[[Tally], Finding]:
    """Return how `position_best` or `position_worst` is found."""

    def find(tally: Tally) -> Finding:
        from scipy.stats import chisquare

        sizes, at = np.array(tally.sizes), np.array(tally.best_at if side == "best" else tally.worst_at)
        if len(sizes) == 0 or sizes.max() < 2:
            return Finding(None, advice="No position is known.")
        table, expected = _position_table(at, sizes)
        test = chisquare([row["observed"] for row in table], expected)
        gap = max(abs(row["rate"] - row["chance"]) for row in table)
        ok = bool(gap <= 0.03 or test.pvalue >= 0.01)
        tendency = "none" if ok else _tendency(at, sizes)
        detail = {"positions": table, "chi_squared": short(test.statistic), "p_value": short(test.pvalue)}
        detail |= {"tendency": tendency, "verdicts": len(at)}
        return Finding(100 * gap, ok, _position_advice(table, side, tendency), detail)

    return find


def _position_table(at: NDArray[Any], sizes: NDArray[Any]) -> tuple[list[dict[str, Any]], list[float]]:
    """Return a row for each position (1-based) with its 95 % Wilson interval, and the counts by chance."""
    expected = [float((1 / sizes[sizes > k]).sum()) for k in range(sizes.max())]
    table = []
    for k, chance in enumerate(expected):
        shown, observed = int((sizes > k).sum()), int((at == k).sum())
        table.append(
            {
                "position": k + 1,
                "shown": shown,
                "observed": observed,
                "rate": short(observed / shown),
                "chance": short(chance / shown),
                "lift": short(observed / chance),
                "interval": [short(bound) for bound in wilson_interval(observed, shown)],
            }
        )
    return table, expected


def _tendency(at: NDArray[Any], sizes: NDArray[Any]) -> str:
    """Say whether the mean position lies two standard errors from chance; by chance it is uniform on each row."""
    drift = (at - (sizes - 1) / 2).sum() / np.sqrt(((sizes**2 - 1) / 12).sum())
    return "late" if drift > 2 else "early" if drift < -2 else "single"


def _position_advice(table: Sequence[dict[str, Any]], side: str, tendency: str) -> str:
    top, low = max(table, key=lambda row: row["lift"]), min(table, key=lambda row: row["lift"])
    where = f"{tendency} positions" if tendency != "single" else f"position {top['position']}"
    verb = "prefers" if side == "best" else "puts down"
    found = (
        f"The judge {verb} {where}: the {side} was at position {top['position']} in {percent(top['rate'])} of the "
        f"verdicts and at position {low['position']} in {percent(low['rate'])} (chance {percent(top['chance'])})."
    )
    if side == "worst":
        return f"{found} The remedy is that for the best completion's position."
    return (
        f"{found} Pairs from one order would teach that. Raise judging.orders (2 at least, num_completions for every "
        "position equally often), keep judging.pair_policy unanimous, or take a stronger judging.model."
    )


def find_flips(tally: Tally) -> Finding:
    """Return how often one judge names another best when the order changes."""
    if not tally.compared:
        advice = "No prompt was judged in two orders: set judging.orders to 2 or more to see whether verdicts last."
        return Finding(None, advice=advice)
    rate = tally.flipped["best"] / tally.compared
    advice = (
        f"Shown the same completions in another order, the judge names another best {percent(rate)} of the time. "
        "Take a stronger judging.model or a sharper judging.rubric; or raise generation.num_completions or "
        "temperature, so that the best stands out. Keep judging.pair_policy unanimous meanwhile."
    )
    interval = [short(bound) for bound in wilson_interval(tally.flipped["best"], tally.compared)]
    worst = short(tally.flipped["worst"] / tally.compared)
    return at_most(
        tally.flipped["best"], tally.compared, 0.45, advice, compared=tally.compared, interval=interval, worst=worst
    )


def find_agreement(tally: Tally) -> Finding:
    """Return Krippendorff's alpha of the best; a unit is a prompt, a rater one judge in one order."""
    alpha, worst = (_alpha(np.array(tally.unit), np.array(values)) for values in (tally.best, tally.worst))
    detail = {"prompts": int((np.bincount(tally.unit) > 1).sum()) if len(tally.unit) else 0, "worst": worst}
    if alpha is None:
        return Finding(None, advice="Needs two votes on a prompt: set judging.orders to 2 or more.", detail=detail)
    advice = (
        "The votes on a prompt agree little more than chance would have it. Take a stronger judging.model, a sharper "
        "judging.rubric, or completions that differ more (generation.num_completions, temperature)."
    )
    return Finding(alpha, alpha >= 0.4, advice, detail)


def _alpha(units: NDArray[Any], values: NDArray[Any]) -> float | None:
    """Return nominal alpha (Krippendorff 2011); None where no unit has two values, or all values are equal."""
    import krippendorff

    if len(units) == 0:
        return None
    counts = np.zeros((units.max() + 1, values.max() + 1), dtype=np.int64)
    np.add.at(counts, (units, values), 1)
    counts = counts[counts.sum(axis=1) > 1]
    if (counts.sum(axis=0) > 0).sum() < 2:
        return None
    return short(float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal")))


def find_confidence(tally: Tally) -> Finding:
    """Return the judges' mean confidence in their verdicts."""
    total = tally.confidence.total()
    if not total:
        return Finding(None)
    mean = sum(value * count for value, count in tally.confidence.items()) / total
    value, count = tally.confidence.most_common(1)[0]
    advice = None
    if mean < 3:
        advice = (
            "The judge is unsure of most verdicts: raise generation.num_completions or temperature so that the "
            "extremes differ, or judging.min_confidence to drop the least certain pairs."
        )
    elif count > 0.95 * total and total >= 20:
        advice = (
            f"{percent(count / total)} of the votes say {value}: the figure tells nothing here, so leave "
            "judging.min_confidence at 1 and rely on judging.orders."
        )
    histogram = {str(value): count for value, count in sorted(tally.confidence.items())}
    return Finding(mean, advice is None, advice, {"histogram": histogram})


# ---- the texts


def find_degenerate(tally: Tally) -> Finding:
    """Return the number of pairs that teach nothing."""
    advice = "Pairs whose sides are equal or empty teach nothing: take them out of the file."
    return Finding(float(tally.degenerate), tally.degenerate == 0 if tally.pairs else None, advice)


def find_longer(tally: Tally) -> Finding:
    """Return how often the longer side was chosen, of the pairs whose sides differ in length."""
    difference = np.array(tally.chosen) - np.array(tally.rejected)
    longer, shorter = int((difference > 0).sum()), int((difference < 0).sum())
    if not longer + shorter:
        return Finding(None)
    low, high = wilson_interval(longer, longer + shorter)
    which = "longer" if low > 0.55 else "shorter"
    advice = (
        f"The judge prefers the {which} completion, and the policy will learn that. Say in judging.rubric that length "
        f"does not count; {'lower generation.max_tokens; ' if which == 'longer' else ''}watch the win rate with length "
        "taken out."
    )
    counts = {"longer": longer, "shorter": shorter, "equal": tally.pairs - longer - shorter}
    detail = {**counts, "interval": [short(low), short(high)]}
    return Finding(longer / (longer + shorter), low <= 0.55 and high >= 0.45, advice, detail)


def find_diversity(tally: Tally) -> Finding | None:
    """Return distinct-2 (Li et al. 2016) of two completions of a prompt."""
    if not tally.scored:
        return None
    means = {n: tally.distinct[n] / tally.scored for n in NGRAMS}
    advice = (
        "The completions of a prompt repeat each other, so best and worst hardly differ: raise generation.temperature "
        "(0.8-1.0 is the useful range) or generation.frequency_penalty."
    )
    detail = {f"distinct_{n}": short(mean) for n, mean in means.items()} | {"prompts": tally.scored}
    return Finding(means[2], means[2] >= 0.55, advice, detail)


def find_speakers(tally: Tally) -> Finding | None:
    """Return half the summed differences in who speaks, between chosen and rejected; only of scenes."""
    if tally.scenes * 2 <= tally.pairs or not tally.pairs:
        return None
    chosen, rejected = tally.speakers["chosen"], tally.speakers["rejected"]
    shares = {name: (chosen[name] / chosen.total(), rejected[name] / rejected.total()) for name in chosen | rejected}
    gap = sum(abs(a - b) for a, b in shares.values()) / 2
    common = [name for name, _ in (chosen + rejected).most_common(12) if name != OTHER]
    p_value = _independence(chosen, rejected, common)
    advice = (
        "Some characters speak much more in chosen than in rejected (or the reverse), and the policy will learn who "
        "speaks, not how. Look at the table; say in judging.rubric that who speaks does not count."
    )
    table = [{"speaker": n, "chosen": short(shares[n][0]), "rejected": short(shares[n][1])} for n in common]
    detail = {"speakers": table, "p_value": short(p_value)}
    return Finding(gap, gap <= 0.05 or p_value >= 0.01, advice, detail)


def _independence(chosen: Counter[str], rejected: Counter[str], names: Sequence[str]) -> float:
    """Return the p-value of a chi-squared test that chosen and rejected have the same speakers."""
    from scipy.stats import chi2_contingency

    columns = [(chosen[name], rejected[name]) for name in names]
    rest = [lines.total() - sum(lines[name] for name in names) for lines in (chosen, rejected)]
    columns += [(rest[0], rest[1])] if any(rest) else []
    return float(chi2_contingency(columns).pvalue) if len(columns) > 1 else 1.0


def find_cut(tally: Tally) -> Finding | None:
    """Return the share of completions that were cut."""
    if not tally.finish_reasons:
        return None
    advice = (
        "Many completions end in mid-sentence; such a side is trained on without an end of turn. Raise "
        "generation.max_tokens, or leave these pairs out with judging.leave_out_cut."
    )
    reasons = dict(tally.finish_reasons)
    return at_most(tally.finish_reasons["length"], tally.finish_reasons.total(), 0.1, advice, finish_reasons=reasons)


POSITION = "within 3 points of chance at every position, or chi-squared p of at least 0.01"
JUDGE = (
    MetricSpec("pair_yield", "Prompts that gave a pair", "share", "at least 30 %", find_yield),
    MetricSpec("failed_prompts", "Prompts that could not be judged", "share", "at most 1 %", find_failed),
    MetricSpec("position_best", "Best completion by position", "points from chance", POSITION, find_positions("best")),
    MetricSpec(
        "position_worst", "Worst completion by position", "points from chance", POSITION, find_positions("worst")
    ),
    MetricSpec(
        "flip_rate", "Best changes with the order", "share",
        "at most 45 %, the median of strong judges on close story pairs", find_flips,
    ),
    MetricSpec(
        "agreement", "Agreement of the votes (Krippendorff's alpha)", None,
        "at least 0.4 (0: chance, 1: every vote alike)", find_agreement,
    ),
    MetricSpec(
        "confidence", "Judge's confidence (1-5)", None, "mean of at least 3, and no value in over 95 % of the votes",
        find_confidence,
    ),
    MetricSpec("parse_failures", "Verdicts that could not be read", "share", "at most 1 %", find_unreadable),
    MetricSpec(
        "tokens_per_verdict", "Tokens per verdict (prompt and completion)", "tokens", "for information", find_usage
    ),
)  # fmt: skip
TEXTS = (
    MetricSpec("degenerate_pairs", "Pairs with equal or empty sides", "pairs", "none", find_degenerate),
    MetricSpec(
        "longer_chosen", "Longer one is chosen (characters)", "share", "interval reaches into 45-55 %", find_longer
    ),
    MetricSpec(
        "distinct_2", "Distinct bigrams in two completions of a prompt", "share", "at least 55 %", find_diversity
    ),
    MetricSpec(
        "speaker_balance", "Speakers: difference between chosen and rejected", "share of lines",
        "at most 5 %, or chi-squared p of at least 0.01", find_speakers,
    ),
    MetricSpec("cut_by_length", "Completions cut by max_tokens", "share", "at most 10 %", find_cut),
)  # fmt: skip


def make_report(tally: Tally, specs: Sequence[MetricSpec]) -> QualityReport:
    """Return the report on counted rows: the metrics that they give, and how long chosen and rejected are."""
    return QualityReport(
        rows=tally.rows,
        pairs=tally.pairs,
        statuses=dict(tally.statuses),
        reasons=dict(tally.reasons.most_common()),
        metrics=[metric for spec in specs if (metric := spec.measure(tally)) is not None],
        detail={"lengths": _histogram(tally)},
    )


def _histogram(tally: Tally) -> dict[str, Any]:
    """Return how long both sides are, in characters; the last bin holds the longest per cent, whatever it is."""
    if not tally.pairs:
        return {}
    sides = {"chosen": np.array(tally.chosen), "rejected": np.array(tally.rejected)}
    reach = float(np.quantile(np.concatenate(list(sides.values())), 0.99)) + 1
    edges = np.linspace(0, reach, BINS + 1).round(1)
    counts = {side: np.histogram(np.minimum(values, reach), edges)[0].tolist() for side, values in sides.items()}
    medians = {side: float(np.median(values)) for side, values in sides.items()}
    return {"edges": edges.tolist(), **counts, "medians": medians}
