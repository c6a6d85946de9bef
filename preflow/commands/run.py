"""`preflow run`."""

import asyncio

from preflow.options import CONFIG, Changes, File, On


def run(
    file: File = CONFIG,
    /,
    *,
    changes: Changes = (),
    on: On = None,
) -> int:
    """Make a better adapter: sample, judge, train, prove, promote.

    Run again with the same settings it continues where it was; what is finished or paid for is not done again. It uses
    the Prefect server of PREFECT_API_URL or of `preflow up`, else one of its own.

    """
    from preflow.settings import load_settings

    settings = load_settings(file, changes)
    if on is not None:
        from preflow.following import follow

        return follow(on, settings, sweep=False)
    from flows.pipeline import dpo_pipeline
    from preflow.outcome import tell
    from preflow.terminal import shown

    with shown(settings.folder, "run"):
        result = asyncio.run(dpo_pipeline(settings.config))
    return tell(settings.config, result)
