"""What a finished run found, and what shows it: `preflow report`, `label`, `evidence`, `verify`."""

import hashlib
import posixpath
import webbrowser
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from preflow.cli import Exit
from preflow.options import Made, Run, Switch, write_file
from tasks.errors import PreflowError


def report(run: Run = "config.yaml", /, *, changes: Made = (), open: Switch = False) -> int:
    """Say how a run ended and where its report is.

    Parameters
    ----------
    open
        Show the report in the browser.
    """
    from preflow.outcome import find_run, tell

    config, result, folder = find_run(run, changes)
    uri = posixpath.join(folder, "report.html")
    code = tell(config, result, uri)
    if open and not webbrowser.open(uri if "://" in uri else Path(uri).as_uri()):
        raise PreflowError(f"there is no browser here: open {uri} elsewhere; it is one file, to send or to copy")
    return code


def label(
    run: Run = "config.yaml",
    /,
    *,
    pairs: Annotated[int, Parameter(validator=Number(gte=1))] = 50,
    port: Annotated[int, Parameter(validator=Number(gte=0, lte=65535))] = 0,
    quiet: Switch = False,
    changes: Made = (),
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
    """
    from preflow.labelling import serve
    from preflow.outcome import find_run
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


def evidence(run: Run = "config.yaml", /, *, to: Path = Path("evidence.json"), changes: Made = ()) -> None:
    """Write one file with all that a run's verdict rests on: comparisons, votes, rubric, digests, settings.

    It holds the held-out prompts and what was written on them; no address, no secret, no folder.

    Parameters
    ----------
    to
        The file; equal runs give equal bytes.
    """
    from preflow.outcome import find_run
    from tasks.evaluate.evidence import collect_evidence

    config, result, _ = find_run(run, changes)
    text = collect_evidence(result.evaluation, config.promotion).text()
    write_file(to, text)
    print(f"wrote {to}, {len(text):,} bytes, sha256 {hashlib.sha256(text).hexdigest()}")
    print(f"Anyone can recompute every figure from it: preflow verify {to}")


def verify(file: Path, /) -> int:
    """Recompute every figure of a verdict from its evidence, here and offline, and name what does not agree.

    Whoever can change the file can change its digests with it: compare the file's own, which is printed, with that on
    the model card.

    Parameters
    ----------
    file
        What `preflow evidence` wrote.
    """
    from tasks.evaluate.evidence import find_differences, read_evidence

    found = read_evidence(file)
    if differences := list(find_differences(found)):
        print("\n".join(f"differs: {difference}" for difference in differences))
        print(f"{file} does not hold: {len(differences)} differences")
        return Exit.WRONG
    verdict, null = found.verdict, f", {len(found.null):,} of SFT against itself" if found.null is not None else ""
    adapter, count = verdict.adapter_sha256[:12], len(found.comparisons)
    print(f"holds: adapter {adapter} wins {verdict.text()}; {count:,} comparisons{null}")
    if (agreement := verdict.agreement) is not None:
        print(f"a person agrees in {agreement.share.text()}; corrected by that it wins {agreement.corrected.text()}")
    print(f"it {'passes' if found.passes else 'does not pass'} a bar of {found.min_win_rate:.3g}")
    print(f"sha256 of {file}: {hashlib.sha256(file.read_bytes()).hexdigest()}")
    return Exit.DONE
