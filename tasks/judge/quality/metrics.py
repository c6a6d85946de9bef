"""From counters to metrics: value, healthy range, and the parameter to change when it is left."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.judge.quality.counters import NGRAMS, OTHER, Diversity, Lengths, Positions, Tally, short, wilson_interval
from tasks.store.measures import Metric


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def judge_metrics(tally: Tally) -> list[Metric]:
    return [
        *position_metrics(tally),
        _flip_metric(tally),
        _agreement_metric(tally),
        confidence_metric(tally.confidence),
        _parse_metric(tally),
        _usage_metric(tally),
    ]


def text_metrics(tally: Tally) -> list[Metric]:
    metrics = [_degenerate_metric(tally)]
    metrics += [_length_metric(tally.characters, "characters"), _length_metric(tally.tokens, "tokens")]
    if tally.diversity.prompts:
        metrics.append(_diversity_metric(tally.diversity))
    if tally.scenes * 2 > tally.pairs:
        metrics.append(_speaker_metric(tally.speakers))
    if tally.finish_reasons:
        metrics.append(_cut_metric(tally.finish_reasons))
    return metrics


def yield_metric(tally: Tally) -> Metric:
    share = tally.pairs / tally.rows if tally.rows else None
    ok = None if share is None else share >= 0.3
    advice = None
    if ok is False:
        reason = next(iter(tally.reasons.most_common(1)), ("", 0))[0]
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
    return Metric(
        name="pair_yield",
        title="Prompts that gave a pair",
        value=None if share is None else short(share),
        unit="share",
        healthy="at least 30 %",
        ok=ok,
        advice=advice,
        detail={"statuses": dict(tally.statuses)},
    )


def failure_metric(tally: Tally) -> Metric:
    failed = tally.statuses["failed"]
    share = failed / tally.rows if tally.rows else None
    ok = None if share is None else share <= 0.01
    advice = (
        f"{failed:,} prompts could not be judged: `votes[].error` in judged.jsonl says why. Where verdicts were cut, "
        "raise judging.max_tokens; where the endpoint refused, look at its limits. Run again: only these are asked."
    )
    return Metric(
        name="failed_prompts",
        title="Prompts that could not be judged",
        value=None if share is None else short(share),
        unit="share",
        healthy="at most 1 %",
        ok=ok,
        advice=advice if ok is False else None,
        detail={"failed": failed},
    )


def position_metrics(tally: Tally) -> list[Metric]:
    return [
        _position_metric(tally.best, "best", "Best completion by position"),
        _position_metric(tally.worst, "worst", "Worst completion by position"),
    ]


def _position_metric(positions: Positions, side: str, title: str) -> Metric:
    from scipy.stats import chisquare

    name, healthy = f"position_{side}", "within 3 points of chance at every position, or chi-squared p of at least 0.01"
    table = positions.table()
    if len(table) < 2:
        return Metric(name=name, title=title, value=None, healthy=healthy, advice="No position is known.")
    test = chisquare([row["observed"] for row in table], [positions.expected[k] for k in sorted(positions.shown)])
    gap = max(abs(row["rate"] - row["chance"]) for row in table)
    ok = bool(gap <= 0.03 or test.pvalue >= 0.01)
    tendency = "none" if ok else _tendency(positions.drift())
    return Metric(
        name=name,
        title=title,
        value=short(100 * gap),
        unit="points from chance",
        healthy=healthy,
        ok=ok,
        advice=None if ok else _position_advice(table, side, tendency),
        detail={
            "positions": table,
            "chi_squared": short(test.statistic),
            "p_value": short(test.pvalue),
            "tendency": tendency,
            "verdicts": sum(positions.observed.values()),
        },
    )


def _tendency(drift: float) -> str:
    return "late" if drift > 2 else "early" if drift < -2 else "single"


def _position_advice(table: list[dict[str, Any]], side: str, tendency: str) -> str:
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


def _flip_metric(tally: Tally) -> Metric:
    flips, worst = tally.flips, tally.worst_flips
    healthy = "at most 45 %, the median of strong judges on close story pairs"
    title = "Best changes with the order"
    if not flips.compared:
        return Metric(
            name="flip_rate",
            title=title,
            value=None,
            unit="share",
            healthy=healthy,
            advice="No prompt was judged in two orders: set judging.orders to 2 or more to see whether verdicts last.",
        )
    rate = flips.flipped / flips.compared
    advice = (
        f"Shown the same completions in another order, the judge names another best {percent(rate)} of the time. "
        "Take a stronger judging.model or a sharper judging.rubric; or raise generation.num_completions or "
        "temperature, so that the best stands out. Keep judging.pair_policy unanimous meanwhile."
    )
    return Metric(
        name="flip_rate",
        title=title,
        value=short(rate),
        unit="share",
        healthy=healthy,
        ok=rate <= 0.45,
        advice=advice if rate > 0.45 else None,
        detail={
            "compared": flips.compared,
            "prompts": flips.prompts,
            "prompts_flipped": flips.prompts_flipped,
            "interval": [short(bound) for bound in wilson_interval(flips.flipped, flips.compared)],
            "worst": short(worst.flipped / worst.compared),
        },
    )


def _agreement_metric(tally: Tally) -> Metric:
    alpha, worst = tally.agreement.alpha(), tally.worst_agreement.alpha()
    ok = None if alpha is None else alpha >= 0.4
    advice = (
        "The votes on a prompt agree little more than chance would have it. Take a stronger judging.model, a sharper "
        "judging.rubric, or completions that differ more (generation.num_completions, temperature)."
    )
    if alpha is None:
        advice = "Needs two votes on a prompt: set judging.orders to 2 or more."
    return Metric(
        name="agreement",
        title="Agreement of the votes (Krippendorff's alpha)",
        value=None if alpha is None else short(alpha),
        healthy="at least 0.4 (0: chance, 1: every vote alike)",
        ok=ok,
        advice=None if ok else advice,
        detail={
            "prompts": tally.agreement.units,
            "worst": None if worst is None else short(worst),
            "definition": "nominal; a unit is a prompt, its value the best completion, a rater one judge in one order",
        },
    )


def _length_metric(lengths: Lengths, unit: str) -> Metric:
    decided = lengths.longer + lengths.shorter
    name, title = f"longer_chosen_{unit}", f"Longer one is chosen ({unit})"
    healthy = "interval reaches into 45-55 %"
    if not decided:
        return Metric(name=name, title=title, value=None, unit="share", healthy=healthy)
    low, high = wilson_interval(lengths.longer, decided)
    ok = low <= 0.55 and high >= 0.45
    which = "longer" if low > 0.55 else "shorter"
    advice = (
        f"The judge prefers the {which} completion, and the policy will learn that. Say in judging.rubric that length "
        f"does not count; {'lower generation.max_tokens; ' if which == 'longer' else ''}watch the length of the "
        "samples in the evaluation."
    )
    return Metric(
        name=name,
        title=title,
        value=short(lengths.longer / decided),
        unit="share",
        healthy=healthy,
        ok=ok,
        advice=None if ok else advice,
        detail={
            "longer": lengths.longer,
            "shorter": lengths.shorter,
            "equal": lengths.equal,
            "interval": [short(low), short(high)],
        },
    )


def _diversity_metric(diversity: Diversity) -> Metric:
    means = {n: diversity.total[n] / diversity.prompts for n in NGRAMS}
    ok = means[2] >= 0.55
    advice = (
        "The completions of a prompt repeat each other, so best and worst hardly differ: raise generation.temperature "
        "(0.8-1.0 is the useful range) or generation.frequency_penalty."
    )
    return Metric(
        name="distinct_2",
        title="Distinct bigrams in two completions of a prompt",
        value=short(means[2]),
        unit="share",
        healthy="at least 55 %",
        ok=ok,
        advice=None if ok else advice,
        detail={**{f"distinct_{n}": short(mean) for n, mean in means.items()}, "prompts": diversity.prompts},
    )


def _speaker_metric(speakers: Mapping[str, Counter[str]]) -> Metric:
    totals = {side: sum(names.values()) for side, names in speakers.items()}
    common = [name for name, _ in (speakers["chosen"] + speakers["rejected"]).most_common(12) if name != OTHER]
    table = [
        {
            "speaker": name,
            "chosen": short(speakers["chosen"][name] / totals["chosen"]),
            "rejected": short(speakers["rejected"][name] / totals["rejected"]),
        }
        for name in common
    ]
    gap = (
        sum(
            abs(speakers["chosen"][name] / totals["chosen"] - speakers["rejected"][name] / totals["rejected"])
            for name in speakers["chosen"] | speakers["rejected"]
        )
        / 2
    )
    p_value = _independence(speakers, common)
    ok = gap <= 0.05 or p_value >= 0.01
    advice = (
        "Some characters speak much more in chosen than in rejected (or the reverse), and the policy will learn who "
        "speaks, not how. Look at the table; say in judging.rubric that who speaks does not count."
    )
    return Metric(
        name="speaker_balance",
        title="Speakers: difference between chosen and rejected",
        value=short(gap),
        unit="share of lines",
        healthy="at most 5 %, or chi-squared p of at least 0.01",
        ok=ok,
        advice=None if ok else advice,
        detail={"speakers": table, "lines": totals, "p_value": short(p_value)},
    )


def _independence(speakers: Mapping[str, Counter[str]], names: Sequence[str]) -> float:
    """Return the p-value of a chi-squared test that chosen and rejected have the same speakers."""
    from scipy.stats import chi2_contingency

    columns = [(speakers["chosen"][name], speakers["rejected"][name]) for name in names]
    rest = [sum(lines.values()) - sum(lines[name] for name in names) for lines in speakers.values()]
    columns += [(rest[0], rest[1])] if any(rest) else []
    return float(chi2_contingency(columns).pvalue) if len(columns) > 1 else 1.0


def confidence_metric(confidence: Counter[int]) -> Metric:
    total = sum(confidence.values())
    title, healthy = "Judge's confidence (1-5)", "mean of at least 3, and no value in over 95 % of the votes"
    if not total:
        return Metric(name="confidence", title=title, value=None, healthy=healthy)
    mean = sum(value * count for value, count in confidence.items()) / total
    value, count = confidence.most_common(1)[0]
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
    return Metric(
        name="confidence",
        title=title,
        value=short(mean),
        healthy=healthy,
        ok=advice is None,
        advice=advice,
        detail={"histogram": {str(value): count for value, count in sorted(confidence.items())}},
    )


def _parse_metric(tally: Tally) -> Metric:
    failures = tally.errors.total() - tally.refused
    share = failures / tally.votes if tally.votes else None
    ok = None if share is None else share <= 0.01
    advice = (
        "Verdicts could not be read. Raise judging.max_tokens (a thinking model spends them before it answers) or "
        "judging.max_attempts, or take a judging.model that follows a JSON schema."
    )
    return Metric(
        name="parse_failures",
        title="Verdicts that could not be read",
        value=None if share is None else short(share),
        unit="share",
        healthy="at most 1 %",
        ok=ok,
        advice=advice if ok is False else None,
        detail={
            "failures": failures,
            "refused": tally.refused,
            "votes": tally.votes,
            "errors": dict(tally.errors.most_common(10)),
        },
    )


def _cut_metric(finish_reasons: Counter[str]) -> Metric:
    share = finish_reasons["length"] / sum(finish_reasons.values())
    ok = share <= 0.1
    advice = (
        "Many completions end in mid-sentence; such a side is trained on without an end of turn. Raise "
        "generation.max_tokens, or leave these pairs out with judging.leave_out_cut."
    )
    return Metric(
        name="cut_by_length",
        title="Completions cut by max_tokens",
        value=short(share),
        unit="share",
        healthy="at most 10 %",
        ok=ok,
        advice=None if ok else advice,
        detail={"finish_reasons": dict(finish_reasons)},
    )


def _usage_metric(tally: Tally) -> Metric:
    usage = {name: tally.usage[f"{name}_tokens"] for name in ("prompt", "completion", "thinking")}
    readable = tally.votes - tally.errors.total()
    value = (usage["prompt"] + usage["completion"]) / readable if readable and tally.usage else None
    return Metric(
        name="tokens_per_verdict",
        title="Tokens per verdict (prompt and completion)",
        value=None if value is None else short(value),
        unit="tokens",
        healthy="for information",
        detail={**usage, "requests": tally.usage["requests"], "verdicts": readable},
    )


def _degenerate_metric(tally: Tally) -> Metric:
    ok = tally.degenerate == 0 if tally.pairs else None
    advice = "Pairs whose sides are equal or empty teach nothing: take them out of the file."
    return Metric(
        name="degenerate_pairs",
        title="Pairs with equal or empty sides",
        value=float(tally.degenerate),
        unit="pairs",
        healthy="none",
        ok=ok,
        advice=advice if ok is False else None,
    )


def leak_metric(train: set[bytes], val: set[bytes]) -> Metric:
    both = len(train & val)
    advice = "Prompts lie in both files, which flatters the held-out accuracy: split by prompt or group, not by pair."
    return Metric(
        name="shared_prompts",
        title="Prompts in both train and val",
        value=float(both),
        unit="prompts",
        healthy="none",
        ok=both == 0 if val else None,
        advice=advice if both else None,
        detail={"train": len(train), "val": len(val)},
    )


def match_metric(tally: Tally) -> Metric:
    unmatched = tally.pairs - tally.placed
    share = unmatched / tally.pairs
    ok = share <= 0.05
    advice = (
        f"{unmatched:,} of {tally.pairs:,} pairs could not be placed among the completions: give the file that these "
        "pairs were judged from. The positions below are those of the others."
    )
    return Metric(
        name="unmatched_pairs",
        title="Pairs whose position is unknown",
        value=short(share),
        unit="share",
        healthy="at most 5 %",
        ok=ok,
        advice=None if ok else advice,
        detail=dict(tally.reasons),
    )
