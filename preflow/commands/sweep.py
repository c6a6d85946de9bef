"""`preflow sweep`."""

import asyncio

from preflow.options import CONFIG, Changes, File, On


def sweep(
    file: File = CONFIG,
    /,
    *,
    changes: Changes = (),
    on: On = None,
) -> int:
    """Try several settings against each other; what they share is done once, and known work not again.

    Parameters
    ----------
    file
        The configuration; its section `sweep` says what to vary, and what may be spent.
    changes
        A setting to change, such as "sweep.grid={training.beta: [0.05, 0.1]}"; may be given more than once.
    """
    from preflow.settings import load_settings

    settings = load_settings(file, changes)
    if on is not None:
        from preflow.following import follow

        return follow(on, settings, sweep=True)
    from flows.sweep import dpo_sweep
    from preflow.terminal import POINTS, shown
    from tasks.sweep.prepare import prepare_points
    from tasks.sweep.ranking import find_sweep

    with shown(settings.folder, "sweep", POINTS):
        asyncio.run(dpo_sweep(settings.config, settings.sweep))
        result = find_sweep(prepare_points(settings.config, settings.sweep).points)
    if result is not None:
        for place, point in enumerate(result.ranked(), 1):
            print(f"{place}. {point.name}: {point.rate.text() if point.rate else ''}")
        print(f"report: {settings.config.workspace}/sweeps/{result.key}/report.html")
    return 0
