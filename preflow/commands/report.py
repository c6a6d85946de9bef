"""`preflow report`."""

import posixpath
import webbrowser
from pathlib import Path

from preflow.options import Changes, Run, Switch


def report(
    run: Run = "config.yaml",
    /,
    *,
    changes: Changes = (),
    open: Switch = False,
) -> int:
    """Say how a run ended and where its report is.

    Parameters
    ----------
    changes
        The changes that the run was made with.
    open
        Show the report in the browser.
    """
    from preflow.finished import find_run
    from preflow.outcome import tell
    from tasks.errors import PreflowError

    config, result, folder = find_run(run, changes)
    uri = posixpath.join(folder, "report.html")
    code = tell(config, result, uri)
    if open and not webbrowser.open(uri if "://" in uri else Path(uri).as_uri()):
        raise PreflowError(f"there is no browser here: open {uri} elsewhere; it is one file, to send or to copy")
    return code
