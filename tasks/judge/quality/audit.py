"""Pairs that something else made, held to the same measures: each is read as a row that a judge has voted on once."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from tasks.errors import PreflowError
from tasks.judge.quality.metrics import confidence, make_metric, make_report, positions, share_at_most, texts
from tasks.judge.quality.tally import Tally
from tasks.store.measures import QualityReport
from tasks.store.records import CompletionsRow, ConversationPairRow, Message, PairRow, prompt_id, read_rows

# Of each prompt: the digests of the texts in every row of completions that it has.
Candidates = dict[str, list[list[bytes]]]


def measure_pairs(train: str, val: str | None = None, completions: str | None = None) -> QualityReport:
    """Measure preference pairs that something else made.

    Pairs hold no positions, so these are recovered from the completions: rows are joined by the prompt's id, and the
    place of the chosen and the rejected text among the row's completions is taken for the position the judge saw
    them in (true of a judge that is shown them once, in the file's order).

    Args:
        train: JSONL of preference pairs, a path or gs:// address.
        val: the held-out pairs, if there are any.
        completions: JSONL of the completions that were judged; without it nothing is said about positions.

    Raises `PreflowError`: a file is missing or empty, or a row is wrong (file, line and field are named).
    """
    tally, rows, lost = Tally(), Counter[str](), Counter[str]()
    candidates = _read_candidates(completions) if completions else None
    prompts: dict[str, set[str]] = {"train": set(), "val": set()}
    for side, uri in (("train", train), ("val", val)):
        for number, pair in enumerate(read_rows(ConversationPairRow, uri) if uri else (), 1):
            key = prompt_id([message.model_dump() for message in pair.prompt])
            prompts[side].add(key)
            rows[side] += 1
            if pair.sft_only:
                continue
            tally.add(_as_judged(pair, None if candidates is None else candidates.get(key, []), lost))
            given = (pair.model_extra or {}).get("confidence")
            if isinstance(given, int | float) and not isinstance(given, bool) and abs(given) < 1e9:
                tally.confidence[round(given)] += 1
            elif given is not None:
                raise PreflowError(f"{uri}, row {number}: confidence is {given!r}, not a number. Give 1-5, or none.")
    both = len(prompts["train"] & prompts["val"])
    advice = "Prompts lie in both files, which flatters the held-out accuracy: split by prompt or group, not by pair."
    about = ("shared_prompts", "Prompts in both train and val", "prompts", "none")
    metrics = [make_metric(about, both, both == 0 if prompts["val"] else None, advice if both else None)]
    if candidates is not None:
        advice = (
            f"{lost.total():,} of {tally.pairs:,} pairs could not be placed among the completions: give the file that "
            "these pairs were judged from. The positions below are those of the others."
        )
        unmatched = ("unmatched_pairs", "Pairs whose position is unknown")
        metrics += [share_at_most(0.05, unmatched, lost.total(), tally.pairs, advice, lost), *positions(tally)]
    metrics += [*([confidence(tally)] if tally.confidence else []), *texts(tally)]
    return make_report(tally, metrics).model_copy(update={"statuses": dict(rows), "reasons": dict(lost)})


def _read_candidates(uri: str) -> Candidates:
    found: Candidates = defaultdict(list)
    for row in read_rows(CompletionsRow, uri):
        key = prompt_id([message.model_dump() for message in row.prompt])
        found[key].append([_text_key(text) for text in row.completions])
    return found


def _text_key(text: str) -> bytes:
    """Return a short digest of a text; white space at its ends does not count."""
    return hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _as_judged(pair: PairRow, rows: list[list[bytes]] | None, lost: Counter[str]) -> dict[str, Any]:
    """Return a pair as a row of `judged.jsonl`, with a vote in the order in which the texts stood, where known."""
    sides, votes = [_text(pair.chosen), _text(pair.rejected)], []
    place = None if rows is None else _place(rows, *map(_text_key, sides))
    if isinstance(place, str):
        lost[place] += 1
    elif place is not None:
        best, worst, shown = place
        votes.append({"judge": "unknown", "order": list(range(shown)), "best": best, "worst": worst})
    return {"status": "pair", "completions": sides, "best": 0, "worst": 1, "votes": votes}


def _text(side: Sequence[Message]) -> str:
    """Return a side as one text: the answer, or all turns of one that parts from the other earlier."""
    return "\n\n".join(turn.content for turn in side)


def _place(rows: Sequence[list[bytes]], best: bytes, worst: bytes) -> tuple[int, int, int] | str:
    """Return where the best and the worst stood among how many, or why that is not known."""
    if not rows:
        return "prompt not among the completions"
    found = [row for row in rows if best in row and worst in row]
    if not found:
        return "text not among the prompt's completions"
    places = {(row.index(best), row.index(worst), len(row)) for row in found}
    twice = best == worst or any(row.count(best) > 1 or row.count(worst) > 1 for row in found)
    return "text at more than one position" if twice or len(places) > 1 else places.pop()
