"""`preflow rollback`."""

import asyncio

from preflow.options import CONFIG, File


def rollback(file: File = CONFIG, /, *, to: str | None = None) -> None:
    """Serve the adapter before the present one again, or the one of the history that is named.

    Parameters
    ----------
    file
        The configuration; its `promotion` says what is served, and where.
    to
        The first characters, at least 6, of the digest of the adapter to go back to.
    """
    from flows.rollback import rollback_adapter
    from preflow.settings import load_settings
    from preflow.terminal import shown

    settings = load_settings(file)
    with shown(settings.folder, "rollback"):
        served = asyncio.run(rollback_adapter(settings.config.workspace, settings.config.promotion, to))
    print(f"{served.name} is adapter {served.adapter_sha256[:12]} again")
