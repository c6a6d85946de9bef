"""Asking LLM judges: the scene and all completions, in several orders, with verdicts read strictly."""

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from pydantic import BaseModel

from tasks.batch import leaving
from tasks.batch.caching import find_finished
from tasks.batch.costs import CostLog, say_prices, write_manifest
from tasks.batch.progress import run_shards, try_question
from tasks.batch.rows import Outcome, RowStore, ShardRef, Slice, slice_rows, writable
from tasks.batch.shards import MergeCounts, ShardWorker, Tally, merge_shards, settle
from tasks.config import JudgeConfig, JudgingConfig
from tasks.judge.prompt import MARKS, build_messages, distinct_completions, instructions, orders_for, read_rubric
from tasks.judge.verdict import UnreadableVerdict, read_verdict, verdict_format
from tasks.llm.batches import BatchPending
from tasks.llm.client import Endpoint
from tasks.llm.responses import PERMANENT, Choice, RequestRefused, price
from tasks.store.workspace import Cost, Manifest, Reference, Row, VerdictsRef, Workspace, digest, stage_key

VERSION = 3
MOST_TOKENS = 65_536
# After so many questions that were answered only without a grammar, and none with one, none is sent.
EMPTY_FIRST = 3
COUNTED = ("rows", "units", "failed", "passing")
logger = logging.getLogger(__name__)

Vote: TypeAlias = dict[str, Any]

# For estimates: English prose, and a verdict that is a JSON object of three numbers, and of a score for each completion
# where those are asked for. A thinking model may use all of `max_tokens` for it.
CHARACTERS_PER_TOKEN = 4
VERDICT_TOKENS = 30
SCORE_TOKENS = 8


def verdict_tokens(judging: JudgingConfig, shown: float) -> float:
    """Return how many tokens a verdict over so many completions is expected to have."""
    return VERDICT_TOKENS + (SCORE_TOKENS * shown if judging.wants_scores else 0)


class JudgingPlan(BaseModel, frozen=True):
    """What a judging will do: its judges, its shards, and what the verdicts depend on."""

    workspace: str
    source: Reference
    judging: JudgingConfig
    rubric: str
    slices: list[Slice]

    @property
    def judges(self) -> list["JudgePlan"]:
        """The plan of each judge, in the order of their votes."""
        return [JudgePlan(judging=self, judge=judge) for judge in self.judging.judges()]

    @property
    def key(self) -> str:
        """The content key of all verdicts together."""
        settings = {**self.judging.verdict_identity(), "rubric": digest(self.rubric)}
        settings["instructions"] = digest([instructions(self.judging.wants_scores), MARKS])
        return stage_key("verdicts", VERSION, settings=settings, source=self.source.sha256)

    @property
    def folder(self) -> str:
        """Where the finished artifact lies."""
        return Workspace(self.workspace).uri("verdicts", self.key)

    @functools.cached_property
    def finished(self) -> VerdictsRef | None:
        """The verdicts, if an equal judging had finished when this was first asked for."""
        return find_finished(Workspace(self.workspace), self.folder, VerdictsRef)

    def units_of(self, row: Row) -> dict[str, "Question"]:
        """Return what a judge is asked about a row: one question for each order, by the digest of its messages."""
        distinct = distinct_completions(row["completions"])
        if len(distinct) < 2:
            return {}
        orders = orders_for(row["id"], distinct, self.judging.orders, self.judging.seed)
        questions = (Question(row, order) for order in orders)
        return {digest(self.messages(question)): question for question in questions}

    def messages(self, question: "Question") -> list[dict[str, str]]:
        """Return what a judge is shown."""
        return build_messages(self.rubric, question.row, question.order, self.judging.wants_scores)


class Remaining(BaseModel, frozen=True):
    """What is still to be asked: requests in all, those of them known, and the tokens of the other questions."""

    requests: int
    known: int
    prompt_tokens: int

    @property
    def to_ask(self) -> int:
        """Requests that are still to be sent."""
        return self.requests - self.known


class JudgePlan(BaseModel, frozen=True):
    """What one judge of a judging will do. A vote is known by the judge's settings and the exact messages."""

    judging: JudgingPlan
    judge: JudgeConfig

    @functools.cached_property
    def settings_key(self) -> str:
        """The key of what determines the judge's answers, apart from the messages."""
        settings = {name: value for name, value in self.judge.identity().items() if name != "max_attempts"}
        return stage_key("judging", VERSION, settings=settings)

    def rows(self) -> RowStore:
        """Open the votes given under these settings."""
        judging = self.judging
        shown = judging.judging.model_dump(include={"orders", "seed"})
        asked = digest([judging.rubric, instructions(judging.judging.wants_scores), MARKS, shown])
        return RowStore(judging.workspace, "votes", self.settings_key, variant=asked)

    def remaining(self) -> Remaining:
        """Count what this judge is still to be asked, an equal question once; tokens are characters / 4."""
        keys: set[str] = set()
        characters: dict[str, int] = {}
        rows = self.rows()
        for row in rows.store.read_rows(self.judging.source.uri):
            units = self.judging.units_of(dict(row))
            for key in units.keys() - keys - rows.known(units):
                characters[key] = sum(len(message["content"]) for message in self.judging.messages(units[key]))
            keys |= units.keys()
        tokens = round(sum(characters.values()) / CHARACTERS_PER_TOKEN)
        return Remaining(requests=len(keys), known=len(keys) - len(characters), prompt_tokens=tokens)


def plan_judging(source: Reference, workspace: str, judging: JudgingConfig) -> JudgingPlan:
    """Cut the completions into shards; nothing is requested.

    Raises `PreflowError`: there is no such rubric.
    """
    return JudgingPlan(
        workspace=workspace,
        source=Reference.model_validate(source.model_dump(include=set(Reference.model_fields))),
        judging=judging,
        rubric=read_rubric(judging.rubric),
        slices=slice_rows(Workspace(workspace), source, judging.shard_size),
    )


class Question(NamedTuple):
    """What a judge is asked: one row's completions, in one order of their indexes."""

    row: Row
    order: list[int]


class Judge:
    """One judge: asks until a verdict can be read, with a score of each completion if it is to be `scored`."""

    def __init__(self, endpoint: Endpoint, judge: JudgeConfig, rubric: str, scored: bool = False) -> None:
        self._endpoint, self._config, self._rubric, self._scored = endpoint, judge, rubric, scored
        # Whether a verdict in the grammar was ever read, and how many could be read only without it: some servers put
        # what is written by a grammar where the thinking stands.
        self._takes_grammar, self._emptied = False, 0

    async def judge(self, question: Question) -> Outcome:
        """Return the vote on a row's completions in one order, or what kept it from being read, with what it used."""
        messages, n = build_messages(self._rubric, *question, self._scored), len(question.order)
        budget, most, usage = self._config.max_tokens, MOST_TOKENS, Cost()
        plain, reason, raw = self._emptied >= EMPTY_FIRST and not self._takes_grammar, "", ""
        final, left_out = False, tuple[str, ...]()
        for _ in range(self._config.max_attempts):
            try:
                answer = await self._endpoint.chat(
                    _reminded(messages, reason),
                    may_wait=not reason,
                    temperature=self._config.temperature,
                    max_tokens=budget,
                    response_format=None if plain else verdict_format(n, self._scored),
                )
            except RequestRefused as refused:
                usage += refused.usage
                if refused.reason == "context_length" and budget > self._config.max_tokens:
                    # It took the question with fewer: more tokens do not fit next to it.
                    budget = most = budget // 2
                    plain = True
                    continue
                reason, raw, final = f"refused: {refused.reason}", str(refused), refused.reason in PERMANENT
                if refused.reason != "cut":
                    break
                choice = Choice("", "length", str(refused))
            else:
                usage, left_out = usage + answer.usage, answer.refused
                choice = answer.choices[0]
                raw = choice.text or choice.note
            cut = choice.finish_reason == "length"
            try:
                verdict = read_verdict(choice.text, n, cut, self._scored)
            except UnreadableVerdict as error:
                allowed = self._endpoint.allowed_tokens(budget)
                reason = f"cut at {allowed} tokens" if cut else choice.note or str(error)
                budget = min(most, budget * 2) if cut else budget
                # A grammar can run off in white space up to any limit, or keep a model from ending its thinking.
                plain = not choice.text.strip() or (cut and self._endpoint.allowed_tokens(budget) == allowed)
            else:
                best, worst = question.order[verdict.best], question.order[verdict.worst]
                self._note_grammar(plain, reason)
                vote = {"order": question.order, "best": best, "worst": worst, "confidence": verdict.confidence}
                scores = {} if verdict.scores is None else {"scores": verdict.scores}
                return Outcome(row=vote | scores, usage=usage, refused=left_out)
        failure = {"id": question.row["id"], "order": question.order, "reason": reason, "detail": writable(raw)[:2000]}
        return Outcome(final=final or None, error=failure, usage=usage)

    def _note_grammar(self, plain: bool, reason: str) -> None:
        """Note a verdict that was read, and why an earlier answer to the same question was not."""
        self._takes_grammar = self._takes_grammar or not plain
        if plain and reason and "cut" not in reason and not self._takes_grammar:
            self._emptied += 1
            if self._emptied == EMPTY_FIRST:
                logger.warning(
                    "%s writes nothing by a grammar: it is asked without one from now on", self._config.model
                )


def _reminded(messages: list[dict[str, str]], reason: str) -> list[dict[str, str]]:
    """Add why an earlier answer could not be read: to the same question the same answer would come at temperature 0."""
    if not reason or "cut" in reason:
        return messages
    system, user = messages
    note = f"\n\nAn earlier answer of yours could not be read: {reason}. Answer with the JSON object alone."
    return [system, {**user, "content": user["content"] + note}]


async def collect_verdicts(plan: JudgingPlan) -> VerdictsRef:
    """Return the verdicts on every row, asking for those that are not known yet."""
    if known := plan.finished:
        logger.info("verdicts: %d rows are judged already, in %s", known.rows, known.uri)
        return known
    try:
        shards = await settle(judge_shards(judge) for judge in plan.judges)
    except BatchPending as pending:  # by now nothing of this stage is under way
        await leaving.leave(pending)
    return merge_verdicts(plan, shards)


async def judge_shards(plan: JudgePlan) -> list[ShardRef]:
    """Ask one judge for the votes that are missing, each shard a cached Prefect task, in one window of requests.

    Raises:
        PreflowError: before the first request: the endpoint does not answer, does not know the model or refuses the
            key; later: it is down for too long, the budget is used up, or too much failed.
        BatchPending: a batch is not answered yet, and the server starts the run again if this process ends.
    """
    judge, judging = plan.judge, plan.judging
    costs, store = CostLog(judging.workspace, judging.folder, judge.model), Workspace(judging.workspace)
    logger.info(
        "judging with %s: rubric %s, %d orders, %s", judge.model, judging.judging.rubric, judging.judging.orders,
        say_prices(judge),
    )  # fmt: skip
    async with await Endpoint.connect(costs.left_of(judge), f"judging ({judge.model})") as endpoint:
        if judge.batch:
            folder = store.uri("batches", plan.settings_key)
            endpoint.use_batches(store, folder, judging.source.sha256, await leaving.may_leave())

        async def prepare() -> None:
            await endpoint.check_model()
            await endpoint.check_batches()

        worker = ShardWorker(
            rows=plan.rows(),
            units_of=judging.units_of,
            work=Judge(endpoint, judge, judging.rubric, judging.judging.wants_scores).judge,
            tally=Tally(judging.source.rows, judging.judging.orders, judge.max_failure_ratio),
            concurrency=endpoint.most_in_flight,
            prepare=prepare,
        )
        return await run_shards("judge", judging.slices, worker, endpoint, costs)


# Two answers that anyone can tell apart.
TRIAL = {
    "id": "trial",
    "prompt": [{"role": "user", "content": "Say hello."}],
    "completions": ["Hello! How are you today?", "No."],
}


async def try_judge(endpoint: Endpoint, judge: JudgeConfig, rubric: str, scored: bool = False) -> None:
    """Ask a judge one real question, as the stage will; nothing of it is kept.

    Raises `PreflowError`: no verdict can be read from its answer.
    """
    question = Question(TRIAL, [0, 1])
    await try_question("judging", endpoint, Judge(endpoint, judge, rubric, scored).judge(question))


def merge_verdicts(plan: JudgingPlan, shards: Sequence[list[ShardRef]]) -> VerdictsRef:
    """Put all judges' votes (the shards of each) next to the completions, in input order, as `verdicts.jsonl`."""
    store, folder = Workspace(plan.workspace), plan.folder
    counts = {judge.judge.model: MergeCounts() for judge in plan.judges}
    merged = [
        merge_shards(plan.slices, refs, judge.rows(), plan.units_of, as_asked)
        for judge, refs in zip(plan.judges, shards, strict=True)
    ]
    with store.writing(f"{folder}/verdicts.jsonl") as out, store.writing(f"{folder}/failures.jsonl") as failures:
        for of_judges in zip(*merged, strict=True):
            votes: list[Vote] = []
            for (model, count), (_, outcomes) in zip(counts.items(), of_judges, strict=True):
                count.add(outcomes)
                for row, error in ((outcome.row, outcome.error) for outcome in outcomes):
                    if error is None:
                        votes.append({"judge": model, **(row or {})})
                        continue
                    failures.write_row({"judge": model, **error})
                    failed = {"order": error["order"], "error": error["reason"], "raw": error["detail"]}
                    votes.append({"judge": model, **failed})
            out.write_row({**of_judges[0][0], "votes": votes})
    with store.writing(f"{folder}/rubric.md") as rubric:
        rubric.write(plan.rubric.encode())
    artifact = VerdictsRef(uri=f"{folder}/verdicts.jsonl", manifest=f"{folder}/manifest.json", **out.facts())
    made = Manifest(
        artifact=artifact, stage="judging", version=VERSION, key=plan.key, config=plan.judging, upstream=(plan.source,),
        files={"verdicts.jsonl": out.file, "failures.jsonl": failures.file, "rubric.md": rubric.file},
        counts={f"{name} {model}": n for model, found in counts.items() for name, n in found.named(*COUNTED).items()},
        cost=sum((price(counts[judge.judge.model].usage, judge.judge) for judge in plan.judges), Cost()),
    )  # fmt: skip
    write_manifest(store, made)
    return artifact


def as_asked(question: Question, outcome: Outcome) -> Outcome:
    """Return the outcome of an equal question as this question's: the same texts may have other indexes in its row."""
    if outcome.row is None:
        failure = {**(outcome.error or {}), "id": question.row["id"], "order": question.order}
        return outcome.model_copy(update={"error": failure})
    asked = outcome.row["order"]
    places = {name: question.order[asked.index(outcome.row[name])] for name in ("best", "worst")}
    return outcome.model_copy(update={"row": {**outcome.row, "order": question.order, **places}})
