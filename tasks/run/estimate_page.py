"""What is to come and what it will cost, as pages, lines and figures; one estimate stands behind them all."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from tasks.batch.costs import format_seconds, format_usd
from tasks.config import SweepConfig
from tasks.report.page import Cell, ReportSection, Table
from tasks.run.estimate import COMPARING, JUDGING, Plan, Work

HOW_ESTIMATED = (
    "Tokens: 4 characters each in prompts; a completion as long as those measured in this workspace, or else at its "
    "limit (max_tokens); a verdict 30 tokens until it is measured, at most the judge's max_tokens, as a thinking model "
    "may use. Before there are pairs, every prompt counts as one. Training: as fast as this workspace's on the same "
    "base, or else {rate:g} pairs a second (sweep.pairs_per_second; 1.14 is published for a 3B model with QLoRA on an "
    "L4, batches of 2 x 8), without evaluations and start-up; sampling runs on your own endpoint and takes no GPU time "
    "here. Money: the prices in the configuration; where there is none, nothing is counted. Retries come on top."
)
# More do not fit the UI's page at 1,400 pixels.
COLUMNS = (
    "work", "points", "requests", "known", "tokens in", "tokens out", "at most", "training", "US$", "at most US$",
)  # fmt: skip


def how_estimated(sweep: SweepConfig) -> str:
    """Return where the figures come from."""
    return HOW_ESTIMATED.format(rate=sweep.pairs_per_second)


def approval_section(plan: Plan) -> ReportSection:
    """Show what the judges are about to be asked, what that will cost, and what will come after it."""
    judging, later = plan.of(JUDGING), plan.of(COMPARING).total().to_ask
    return ReportSection(
        "Before judging",
        f"The judge is about to be asked {judging.total().to_ask:,} questions ({money_text(judging)}); the evaluation "
        f"will want up to {later:,} verdicts more.",
        () if judging.is_priced else ("Set judging.prompt_price and completion_price to see what this will cost.",),
        (work_table(judging, "What will be asked"), work_table(plan, "All that is to be done")),
        notes=(how_estimated(SweepConfig()),),
    )


def work_table(plan: Plan, title: str) -> Table:
    """Show each piece of work, and the total; of one run without its number."""
    total = plan.total()
    price = format_price(total.usd if plan.is_priced or total.usd else None)
    rows = [*(_work_row(work, format_price(work.usd)) for work in plan.work), _work_row(total, price)]
    shown = [at for at, name in enumerate(COLUMNS) if name != "points" or len(plan.points()) > 1]
    columns, *cells = (tuple(row[at] for at in shown) for row in (COLUMNS, *rows))
    return Table(title, tuple(map(str, columns)), tuple(cells))


def _work_row(work: Work, price: str) -> tuple[Cell, ...]:
    known = "finished" if work.finished else f"{work.known:,}" if work.requests else None
    name = f"{work.stage} ({work.who})" if work.who else work.stage
    most = format_usd(work.most_usd) if work.most_usd or work.usd is not None else None
    return (
        name, number_ranges(work.points) or None, work.requests or None, known,
        round(work.prompt_tokens) or None, round(work.completion_tokens) or None,
        round(work.most_completion_tokens) or None,
        format_seconds(60 * work.gpu_minutes) if work.gpu_minutes else None, price, most,
    )  # fmt: skip


def format_price(usd: float | None) -> str:
    """Return US$ as text, also where they are not known."""
    return "no price set" if usd is None else format_usd(usd)


def money_text(plan: Plan) -> str:
    """Return what a plan will cost, and what it can cost at most."""
    total = plan.total()
    if not plan.is_priced and not total.usd:
        return format_price(None)
    money = f"about {format_price(total.usd)} US$, at most {format_usd(total.most_usd)}"
    return money + ("" if plan.is_priced else " and what has no price set")


def plan_lines(plan: Plan) -> Iterator[str]:
    """Yield a line for each piece of work still to do, and one for what all of it costs, for logs and terminals."""
    for work in plan.work:
        points = f", points {number_ranges(work.points)}" if len(plan.points()) > 1 else ""
        if work.to_ask:
            tokens = f"{work.prompt_tokens:,.0f} + {work.completion_tokens:,.0f} tokens"
            known = f" ({work.known:,} more known)" if work.known else ""
            price = format_price(work.usd) + (" US$" if work.usd is not None else "")
            yield f"  {work.stage} ({work.who}{points}): {work.to_ask:,} requests{known}, about {tokens}, {price}"
        elif work.gpu_minutes:
            by = "as measured here" if work.is_measured else "on an L4; not measured here yet"
            yield f"  {work.stage} ({work.who}{points}): about {format_seconds(60 * work.gpu_minutes)} {by}"
    yield f"cost: {money_text(plan)}"


def number_ranges(numbers: Sequence[int]) -> str:
    """Return numbers as ranges: 1-3, 5."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(set(numbers))), lambda at: at[1] - at[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
