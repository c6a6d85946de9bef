"""`preflow report`."""

import webbrowser
from pathlib import Path

from preflow.options import CONFIG, Changes, File, Switch


def report(
    file: File = CONFIG,
    /,
    *,
    changes: Changes = (),
    open: Switch = False,
) -> int:
    """Say how the run of a configuration ended and where its report is.

    Parameters
    ----------
    changes
        The changes that the run was made with.
    open
        Show the report in the browser.
    """
    from preflow.outcome import tell
    from preflow.settings import load_settings
    from tasks.errors import PreflowError
    from tasks.run.preflight import find_result, report_uri

    config = load_settings(file, changes).config
    result = find_result(config)
    if result is None:
        raise PreflowError(f"no run with the settings of {file} has finished: preflow run {file}")
    code = tell(config, result)
    uri = report_uri(config.filled())
    if open and not webbrowser.open(uri if "://" in uri else Path(uri).as_uri()):
        raise PreflowError(f"there is no browser here: open {uri} elsewhere; it is one file, to send or to copy")
    return code
