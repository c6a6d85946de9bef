"""What makes an adapter: `preflow check`, `run`, `sweep`, `rounds`."""

import asyncio
from contextlib import ExitStack

from preflow.cli import Exit
from preflow.options import CONFIG, Changes, File, On
from preflow.settings import load_settings


def check(file: File = CONFIG, /, *, changes: Changes = ()) -> int:
    """List all that is wrong with a configuration, what it will cost, and what it can show.

    Each model is asked one question, so that its key, its name and its answers are known to work.
    """
    from preflow.terminal import Display
    from tasks.demo.api import prefect_api
    from tasks.evaluate.power import power_before_price
    from tasks.run.estimate import plan_runs
    from tasks.run.estimate_page import plan_lines
    from tasks.run.preflight import find_problems

    settings = load_settings(file, changes)
    config = settings.config
    with Display(settings.folder / "logs" / "check.log"), ExitStack() as stack:
        if config.training_deployment is not None:
            stack.enter_context(prefect_api(settings.folder))
        problems = asyncio.run(find_problems(config))
        if not problems:
            found = [*plan_lines(plan_runs([config])), f"proof: {power_before_price(config)}"]
    if problems:
        print("\n".join(f"wrong: {problem}" for problem in problems))
        print(f"{len(problems)} to fix; nothing was spent")
        return Exit.WRONG
    print("everything is there: prompts, rubric, adapter, base, models, keys", *found, sep="\n")
    return Exit.DONE


def run(file: File = CONFIG, /, *, changes: Changes = (), on: On = None) -> int:
    """Make a better adapter: sample, judge, train, prove, promote.

    Run again with the same settings it continues where it was; what is finished or paid for is not done again. It uses
    the Prefect server of PREFECT_API_URL or of `preflow up`, else one of its own.
    """
    settings = load_settings(file, changes)
    if on is not None:
        from preflow.following import follow

        return follow(on, settings, sweep=False)
    from preflow.terminal import shown

    with shown(settings.folder, "run"):
        from flows.pipeline import dpo_pipeline
        from preflow.outcome import tell

        result = asyncio.run(dpo_pipeline(settings.config))
    return tell(settings.config, result)


def sweep(file: File = CONFIG, /, *, changes: Changes = (), on: On = None) -> int:
    """Try several settings against each other; what they share is done once, and known work not again.

    Parameters
    ----------
    file
        The configuration; its section `sweep` says what to vary, and what may be spent.
    changes
        A setting to change, such as "sweep.grid={training.beta: [0.05, 0.1]}"; may be given more than once.
    """
    settings = load_settings(file, changes)
    if on is not None:
        from preflow.following import follow

        return follow(on, settings, sweep=True)
    from preflow.terminal import POINTS, shown

    with shown(settings.folder, "sweep", POINTS):
        from flows.sweep import dpo_sweep
        from tasks.sweep.prepare import prepare_points
        from tasks.sweep.ranking import find_sweep

        asyncio.run(dpo_sweep(settings.config, settings.sweep))
        result = find_sweep(prepare_points(settings.config, settings.sweep).points)
    if result is not None:
        for place, point in enumerate(result.ranked(), 1):
            print(f"{place}. {point.name}: {point.rate.text() if point.rate else ''}")
        print(f"report: {settings.config.workspace}/sweeps/{result.key}/report.html")
    return Exit.DONE


def rounds(file: File = CONFIG, /, *, changes: Changes = ()) -> int:
    """Run several rounds, each sampling from the adapter that won the round before, until one does not win.

    The first round is what `preflow run` makes, and costs nothing again. The best adapter is served if it won.

    Parameters
    ----------
    file
        The configuration; its section `rounds` says how many, and where each begins.
    changes
        A setting to change, such as rounds.rounds=3; may be given more than once.
    """
    from flows.rounds import dpo_rounds
    from preflow.terminal import ROUNDS, shown
    from tasks.rounds.rounds import check_held_out, rounds_page, rounds_text

    settings = load_settings(file, changes)
    check_held_out(settings.config, settings.rounds)  # before a server is started for it
    with shown(settings.folder, "rounds", ROUNDS):
        result = asyncio.run(dpo_rounds(settings.config, settings.rounds))
    print(rounds_text(result))
    print(f"report: {rounds_page(result, settings.config.workspace, settings.rounds)}")
    return Exit.DONE if result.promotion is not None else Exit.NOT_BETTER
