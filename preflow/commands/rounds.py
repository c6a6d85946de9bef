"""`preflow rounds`."""

import asyncio

from preflow.options import CONFIG, Changes, File


def rounds(
    file: File = CONFIG,
    /,
    *,
    changes: Changes = (),
) -> int:
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
    from preflow.cli import Exit
    from preflow.settings import load_settings
    from preflow.terminal import ROUNDS, shown
    from tasks.rounds.rounds import check_held_out, rounds_page, rounds_text

    settings = load_settings(file, changes)
    check_held_out(settings.config, settings.rounds)  # before a server is started for it
    with shown(settings.folder, "rounds", ROUNDS):
        result = asyncio.run(dpo_rounds(settings.config, settings.rounds))
    print(rounds_text(result))
    print(f"report: {rounds_page(result, settings.config.workspace, settings.rounds)}")
    return Exit.DONE if result.best is not None else Exit.NOT_BETTER
