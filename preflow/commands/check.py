"""`preflow check`."""

import asyncio
from contextlib import ExitStack

from preflow.options import CONFIG, Changes, File


def check(file: File = CONFIG, /, *, changes: Changes = ()) -> int:
    """List all that is wrong with a configuration, what it will cost, and what it can show.

    Each model is asked one question, so that its key, its name and its answers are known to work.

    """
    from preflow.cli import Exit
    from preflow.settings import load_settings
    from preflow.terminal import Display
    from tasks.demo.local import Places, prefect_api
    from tasks.evaluate.power import power_before_price
    from tasks.run.estimate import plan_runs
    from tasks.run.estimate_page import plan_lines
    from tasks.run.preflight import find_problems

    settings = load_settings(file, changes)
    config = settings.config
    with Display(settings.folder / "logs" / "check.log"), ExitStack() as stack:
        if config.training_deployment is not None:
            stack.enter_context(prefect_api(Places(settings.folder)))
        problems = asyncio.run(find_problems(config))
        found: list[str] = []
        if not problems:
            found = [*plan_lines(plan_runs([config])), f"proof: {power_before_price(config)}"]
    for problem in problems:
        print(f"wrong: {problem}")
    if problems:
        print(f"{len(problems)} to fix; nothing was spent")
        return Exit.WRONG
    print("everything is there: prompts, rubric, adapter, base, models, keys")
    print("\n".join(found))
    return Exit.DONE
