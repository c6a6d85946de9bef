"""`preflow label`."""

import webbrowser
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from preflow.options import Changes, Run, Switch


def label(
    run: Run = "config.yaml",
    /,
    *,
    pairs: Annotated[int, Parameter(validator=Number(gte=1))] = 50,
    port: int = 0,
    quiet: Switch = False,
    changes: Changes = (),
) -> None:
    """Judge comparisons of a run yourself, blind, in the browser: does the judge see what you see?

    Keys 1 and 2: that one is better; 0: no difference; Backspace: the one before. Every answer is kept as it comes;
    Ctrl-C stops, and the same command goes on. The report then shows how far the judge agrees with you, and the win
    rate corrected for its errors; promotion.min_agreement can demand that it does.

    Parameters
    ----------
    pairs
        Comparisons to judge, about 15 seconds each; 40 to 60 are enough to tell.
    port
        Of the page, which only this machine can open; 0: any.
    quiet
        Print the address only; open no browser.
    changes
        The changes that the run was made with.
    """
    from preflow.finished import find_run
    from preflow.labelling import serve
    from tasks.evaluate.labels import Labelling, record_agreement
    from tasks.report.run import run_sections, write_report

    def started(address: str) -> None:
        print(f"{len(labelling.missing)} of {labelling.total} comparisons to judge: {address}", flush=True)
        if not quiet:
            webbrowser.open(address)

    config, result, folder = find_run(run, changes)
    labelling = Labelling(result.evaluation, pairs)
    if labelling.missing:
        try:
            serve(labelling, port, started)
        except KeyboardInterrupt:
            print("stopped; the same command goes on")
    found = record_agreement(result.evaluation)
    if found is None:
        print("nothing is judged yet")
        return
    print(f"you and the judge agree in {found.share.text()} of {found.labels} comparisons (50 % is chance)")
    print(f"win rate, corrected for the judge's errors: {found.corrected.text()}")
    print(f"report: {write_report(config, run_sections(config, result), folder)}")
