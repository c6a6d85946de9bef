"""What is measured about a judge and its pairs: each metric with its range, and what to do outside it."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.judge.quality.tally import NGRAMS, OTHER, Tally
from tasks.store.measures import Metric, QualityReport, percent

BINS = 40
Ints = NDArray[np.int64]


def measure_judgements(rows: Iterable[Mapping[str, Any]], usage: Mapping[str, int] | None = None) -> QualityReport:
    """Measure judged rows in one pass; of each verdict and pair only a few numbers are kept.

    Args:
        rows: the rows of `judged.jsonl`.
        usage: what all verdicts together used: `requests`, `prompt_tokens`, ...
    """
    tally = Tally()
    for row in rows:
        tally.add(row)
    failed, unreadable = _failures(tally)
    judge = (
        _pair_yield(tally), failed, *positions(tally), _flip_rate(tally), _agreement(tally), confidence(tally),
        unreadable, _tokens_per_verdict(tally, usage or {}),
    )  # fmt: skip
    scores = []
    if tally.scores:  # where the judges were asked for them
        mean = sum(score * count for score, count in tally.scores.items()) / tally.scores.total()
        histogram = {str(score): count for score, count in sorted(tally.scores.items())}
        about = ("best_score", "Score of a prompt's best completion (1-10)", None, "for information")
        scores = [make_metric(about, mean, detail={"histogram": histogram})]
    return make_report(tally, [*judge, *scores, *texts(tally)])


def make_report(tally: Tally, metrics: Sequence[Metric]) -> QualityReport:
    """Return the report on counted rows: their metrics, and how long chosen and rejected are, in characters."""
    lengths: dict[str, Any] = {}
    if tally.pairs:
        sides = tally.sides()
        reach = float(np.quantile(sides, 0.99)) + 1  # the last bin holds the longest per cent, whatever it is
        edges = np.linspace(0, reach, BINS + 1).round(1)
        chosen, rejected = (np.histogram(np.minimum(side, reach), edges)[0].tolist() for side in sides)
        medians = dict(zip(("chosen", "rejected"), np.median(sides, axis=1).tolist(), strict=True))
        lengths = {"edges": edges.tolist(), "chosen": chosen, "rejected": rejected, "medians": medians}
    return QualityReport(
        rows=tally.rows,
        pairs=tally.pairs,
        statuses=dict(tally.statuses),
        reasons=dict(tally.reasons.most_common()),
        metrics=list(metrics),
        detail={"lengths": lengths},
    )


def short(value: float) -> float:
    """Return `value` to 6 significant digits, as it stands in a report."""
    return float(f"{value:.6g}")


def make_metric(
    about: tuple[str, str, str | None, str],
    value: float | None,
    ok: bool | None = None,
    advice: str | None = None,
    detail: Mapping[str, Any] | None = None,
) -> Metric:
    """Return a metric; its advice only where it is out of range, or could not be measured.

    `about` is its name, its title, its unit and the range it should lie in; `detail` is what else the report shows.
    """
    name, title, unit, healthy = about
    value, ok = None if value is None else short(value), None if ok is None else bool(ok)
    advice, detail = None if ok else advice, dict(detail or {})
    return Metric(
        name=name, title=title, unit=unit, healthy=healthy, value=value, ok=ok, advice=advice, detail=detail
    )  # fmt: skip


def share_at_most(
    limit: float, about: tuple[str, str], part: int, whole: int, advice: str, detail: Mapping[str, Any]
) -> Metric:
    """Return the metric, by its name and title, of a share that should be at most `limit`."""
    named = (*about, "share", f"at most {percent(limit, '.3g')}")
    if not whole:
        return make_metric(named, None, detail=detail)
    return make_metric(named, part / whole, part / whole <= limit, advice, detail)


def wilson_interval(successes: int, total: int) -> list[float]:
    """Return the 95 % Wilson score interval of a share (Wilson 1927); `total` must be at least 1."""
    from scipy.stats import binomtest  # here and below: scipy takes a second to import, and flows must start at once

    interval = binomtest(successes, total).proportion_ci(confidence_level=0.95, method="wilson")
    return [short(interval.low), short(interval.high)]


# ---- rows


# What helps against too few pairs, by a word of the most frequent reason.
_YIELD_ADVICE = {
    "unanimous|majority": "The judge changes its mind with the order: take a stronger judging.model or a sharper "
    "judging.rubric, make the extremes clearer with a higher generation.num_completions or temperature; "
    "judging.pair_policy majority or borda keeps more pairs, of less certain ones.",
    "confidence": "Lower judging.min_confidence, or raise generation.num_completions so that the extremes differ.",
    "score": "Lower judging.min_chosen_score, or raise generation.num_completions so that one of them is good. Where "
    "most scores are equal, say in judging.rubric what tells a good answer from a fair one.",
    "distinct": "The completions are equal: raise generation.temperature and generation.num_completions.",
    "": "Look at `reason` and `votes` in judged.jsonl.",
}


def _pair_yield(tally: Tally) -> Metric:
    about = ("pair_yield", "Prompts that gave a pair", "share", "at least 30 %")
    if not tally.rows:
        return make_metric(about, None)
    reason = tally.reasons.most_common(1)[0][0] if tally.reasons else "?"
    help_ = next(words for pattern, words in _YIELD_ADVICE.items() if re.search(pattern, reason))
    advice = f"Only {tally.pairs:,} of {tally.rows:,} prompts gave a pair, most often because of: {reason}. {help_}"
    share = tally.pairs / tally.rows
    return make_metric(about, share, share >= 0.3, advice, {"statuses": dict(tally.statuses)})


def _failures(tally: Tally) -> Iterator[Metric]:
    """Yield the shares of prompts without a verdict and of verdicts that could not be read, refused ones apart."""
    failed = tally.statuses["failed"]
    advice = (
        f"{failed:,} prompts could not be judged: `votes[].error` in judged.jsonl says why. Where verdicts were cut, "
        "raise judging.max_tokens; where the endpoint refused, look at its limits. Run again: only these are asked."
    )
    about = ("failed_prompts", "Prompts that could not be judged")
    yield share_at_most(0.01, about, failed, tally.rows, advice, {"failed": failed})
    refused = sum(count for error, count in tally.errors.items() if error.startswith("refused"))
    failures = tally.errors.total() - refused
    advice = (
        "Verdicts could not be read. Raise judging.max_tokens (a thinking model spends them before it answers) or "
        "judging.max_attempts, or take a judging.model that follows a JSON schema."
    )
    errors = dict(tally.errors.most_common(10))
    detail = {"failures": failures, "refused": refused, "votes": tally.votes, "errors": errors}
    about = ("parse_failures", "Verdicts that could not be read")
    yield share_at_most(0.01, about, failures, tally.votes, advice, detail)


def _tokens_per_verdict(tally: Tally, usage: Mapping[str, int]) -> Metric:
    about = ("tokens_per_verdict", "Tokens per verdict (prompt and completion)", "tokens", "for information")
    tokens = {name: usage.get(f"{name}_tokens", 0) for name in ("prompt", "completion", "thinking")}
    verdicts = len(tally.columns()["row"])
    value = (tokens["prompt"] + tokens["completion"]) / verdicts if verdicts and usage else None
    return make_metric(about, value, detail={**tokens, "requests": usage.get("requests", 0), "verdicts": verdicts})


# ---- the judge


def positions(tally: Tally) -> Iterator[Metric]:
    """Yield where the best and the worst stood, against chance."""
    from scipy.stats import chisquare

    columns = tally.columns()
    sizes, healthy = columns["shown"], "within 3 points of chance at every position, or chi-squared p of at least 0.01"
    for side in ("best", "worst"):
        about = (f"position_{side}", f"{side.title()} completion by position", "points from chance", healthy)
        if len(sizes) == 0 or sizes.max() < 2:
            yield make_metric(about, None, advice="No position is known.")
            continue
        at = columns[f"{side}_at"]
        table, expected = _position_table(at, sizes)
        test = chisquare([row["observed"] for row in table], expected)
        gap = max(abs(row["rate"] - row["chance"]) for row in table)
        ok = gap <= 0.03 or test.pvalue >= 0.01
        # By chance the mean position is uniform on each row; two standard errors from that are a tendency.
        drift = (at - (sizes - 1) / 2).sum() / np.sqrt(((sizes**2 - 1) / 12).sum())
        tendency = "none" if ok else "late" if drift > 2 else "early" if drift < -2 else "single"
        detail = {"positions": table, "chi_squared": short(test.statistic), "p_value": short(test.pvalue)}
        detail |= {"tendency": tendency, "verdicts": len(at)}
        yield make_metric(about, 100 * gap, ok, _position_advice(table, side, tendency), detail)


def _position_table(at: Ints, sizes: Ints) -> tuple[list[dict[str, Any]], list[float]]:
    """Return a row for each position (1-based) with its 95 % Wilson interval, and the counts by chance."""
    expected = [float((1 / sizes[sizes > k]).sum()) for k in range(sizes.max())]
    table = []
    for k, chance in enumerate(expected):
        shown, observed = int((sizes > k).sum()), int((at == k).sum())
        rates = {"rate": observed / shown, "chance": chance / shown, "lift": observed / chance}
        row = {"position": k + 1, "shown": shown, "observed": observed, **{n: short(r) for n, r in rates.items()}}
        table.append({**row, "interval": wilson_interval(observed, shown)})
    return table, expected


def _position_advice(table: Sequence[dict[str, Any]], side: str, tendency: str) -> str:
    top, low = max(table, key=lambda row: row["lift"]), min(table, key=lambda row: row["lift"])
    where = f"{tendency} positions" if tendency != "single" else f"position {top['position']}"
    shares = [percent(row[name], ".3g") for row, name in ((top, "rate"), (low, "rate"), (top, "chance"))]
    found = (
        f"The judge {'prefers' if side == 'best' else 'puts down'} {where}: the {side} was at position "
        f"{top['position']} in {shares[0]} of the verdicts and at position {low['position']} in {shares[1]} (chance "
        f"{shares[2]})."
    )
    if side == "worst":
        return f"{found} The remedy is that for the best completion's position."
    return (
        f"{found} Pairs from one order would teach that. Raise judging.orders (2 at least, num_completions for every "
        "position equally often), keep judging.pair_policy unanimous, or take a stronger judging.model."
    )


def _flip_rate(tally: Tally) -> Metric:
    healthy = "at most 45 %, the median of strong judges on close story pairs"
    about = ("flip_rate", "Best changes with the order", "share", healthy)
    flipped, compared = tally.flipped, tally.compared
    if not compared:
        advice = "No prompt was judged in two orders: set judging.orders to 2 or more to see whether verdicts last."
        return make_metric(about, None, advice=advice)
    rate = flipped["best"] / compared
    advice = (
        f"Shown the same completions in another order, the judge names another best {percent(rate, '.3g')} of the "
        "time. Take a stronger judging.model or a sharper judging.rubric; or raise generation.num_completions or "
        "temperature, so that the best stands out. Keep judging.pair_policy unanimous meanwhile."
    )
    interval, worst = wilson_interval(flipped["best"], compared), short(flipped["worst"] / compared)
    return make_metric(about, rate, rate <= 0.45, advice, {"compared": compared, "interval": interval, "worst": worst})


def _agreement(tally: Tally) -> Metric:
    """Return Krippendorff's alpha of the best; a unit is a prompt, a rater one judge in one order."""
    title = "Agreement of the votes (Krippendorff's alpha)"
    about = ("agreement", title, None, "at least 0.4 (0: chance, 1: every vote alike)")
    columns = tally.columns()
    units = columns["row"]
    alpha, worst = (_alpha(units, columns[side]) for side in ("best", "worst"))
    detail = {"prompts": int((np.bincount(units) > 1).sum()), "worst": worst}
    if alpha is None:
        advice = "Needs two votes on a prompt: set judging.orders to 2 or more."
        return make_metric(about, None, advice=advice, detail=detail)
    advice = (
        "The votes on a prompt agree little more than chance would have it. Take a stronger judging.model, a sharper "
        "judging.rubric, or completions that differ more (generation.num_completions, temperature)."
    )
    return make_metric(about, alpha, alpha >= 0.4, advice, detail)


def _alpha(units: Ints, values: Ints) -> float | None:
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


def confidence(tally: Tally) -> Metric:
    """Return the judges' mean confidence in their verdicts."""
    healthy = "mean of at least 3, and no value in over 95 % of the votes"
    about = ("confidence", "Judge's confidence (1-5)", None, healthy)
    total = tally.confidence.total()
    if not total:
        return make_metric(about, None)
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
            f"{percent(count / total, '.3g')} of the votes say {value}: the figure tells nothing here, so leave "
            "judging.min_confidence at 1 and rely on judging.orders."
        )
    histogram = {str(value): count for value, count in sorted(tally.confidence.items())}
    return make_metric(about, mean, advice is None, advice, {"histogram": histogram})


# ---- the texts


def texts(tally: Tally) -> Iterator[Metric]:
    """Yield what is measured of the pairs' texts, where they show it."""
    advice = "Pairs whose sides are equal or empty teach nothing: take them out of the file."
    about = ("degenerate_pairs", "Pairs with equal or empty sides", "pairs", "none")
    yield make_metric(about, tally.degenerate, tally.degenerate == 0 if tally.pairs else None, advice)
    yield _longer_chosen(tally)
    if tally.scored:
        yield _distinct_2(tally)
    if tally.scenes * 2 > tally.pairs > 0:
        yield _speaker_balance(tally)
    if reasons := tally.finish_reasons:
        advice = (
            "Many completions end in mid-sentence; such a side is trained on without an end of turn. Raise "
            "generation.max_tokens, or leave these pairs out with judging.leave_out_cut."
        )
        cut, detail = ("cut_by_length", "Completions cut by max_tokens"), {"finish_reasons": dict(reasons)}
        yield share_at_most(0.1, cut, reasons["length"], reasons.total(), advice, detail)


def _longer_chosen(tally: Tally) -> Metric:
    """Return how often the longer side was chosen, of the pairs whose sides differ in length."""
    about = ("longer_chosen", "Longer one is chosen (characters)", "share", "interval reaches into 45-55 %")
    chosen, rejected = tally.sides()
    longer, shorter = int((chosen > rejected).sum()), int((chosen < rejected).sum())
    if not longer + shorter:
        return make_metric(about, None)
    low, high = interval = wilson_interval(longer, longer + shorter)
    which = "longer" if low > 0.55 else "shorter"
    advice = (
        f"The judge prefers the {which} completion, and the policy will learn that. Say in judging.rubric that length "
        f"does not count; {'lower generation.max_tokens; ' if which == 'longer' else ''}watch the win rate with length "
        "taken out."
    )
    equal = tally.pairs - longer - shorter
    detail = {"longer": longer, "shorter": shorter, "equal": equal, "interval": interval}
    return make_metric(about, longer / (longer + shorter), low <= 0.55 and high >= 0.45, advice, detail)


def _distinct_2(tally: Tally) -> Metric:
    """Return distinct-2 (Li et al. 2016) of two completions of a prompt."""
    means = {n: tally.distinct[n] / tally.scored for n in NGRAMS}
    advice = (
        "The completions of a prompt repeat each other, so best and worst hardly differ: raise generation.temperature "
        "(0.8-1.0 is the useful range) or generation.frequency_penalty."
    )
    detail = {f"distinct_{n}": short(mean) for n, mean in means.items()} | {"prompts": tally.scored}
    about = ("distinct_2", "Distinct bigrams in two completions of a prompt", "share", "at least 55 %")
    return make_metric(about, means[2], means[2] >= 0.55, advice, detail)


def _speaker_balance(tally: Tally) -> Metric:
    """Return half the summed differences in who speaks, between chosen and rejected; only of scenes."""
    from scipy.stats import chi2_contingency

    chosen, rejected = tally.speakers["chosen"], tally.speakers["rejected"]
    shares = {name: (chosen[name] / chosen.total(), rejected[name] / rejected.total()) for name in chosen | rejected}
    gap = sum(abs(a - b) for a, b in shares.values()) / 2
    common = [name for name, _ in (chosen + rejected).most_common(12) if name != OTHER]
    counts = np.array([(chosen[name], rejected[name]) for name in common])
    rest = np.array([chosen.total(), rejected.total()]) - counts.sum(axis=0)
    counts = np.vstack([counts, rest]) if rest.any() else counts
    p_value = float(chi2_contingency(counts).pvalue) if len(counts) > 1 else 1.0
    advice = (
        "Some characters speak much more in chosen than in rejected (or the reverse), and the policy will learn who "
        "speaks, not how. Look at the table; say in judging.rubric that who speaks does not count."
    )
    table = [{"speaker": n, "chosen": short(shares[n][0]), "rejected": short(shares[n][1])} for n in common]
    title, healthy = "difference between chosen and rejected", "at most 5 %, or chi-squared p of at least 0.01"
    about = ("speaker_balance", f"Speakers: {title}", "share of lines", healthy)
    detail = {"speakers": table, "p_value": short(p_value)}
    return make_metric(about, gap, gap <= 0.05 or p_value >= 0.01, advice, detail)
