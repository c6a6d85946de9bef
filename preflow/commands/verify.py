"""`preflow verify`."""

import hashlib
from pathlib import Path


def verify(file: Path, /) -> int:
    """Recompute every figure of a verdict from its evidence, here and offline, and name what does not agree.

    Whoever can change the file can change its digests with it: compare the file's own, which is printed, with that on
    the model card.

    Parameters
    ----------
    file
        What `preflow evidence` wrote.
    """
    from preflow.cli import Exit
    from tasks.evaluate.evidence import find_differences, read_evidence

    evidence = read_evidence(file)
    differences = list(find_differences(evidence))
    for difference in differences:
        print(f"differs: {difference}")
    if differences:
        print(f"{file} does not hold: {len(differences)} differences")
        return Exit.WRONG
    found = evidence.verdict
    count = len(evidence.comparisons)
    null = f", {len(evidence.null):,} of SFT against itself" if evidence.null is not None else ""
    print(f"holds: adapter {found.adapter_sha256[:12]} wins {found.text()}; {count:,} comparisons{null}")
    if (agreement := found.agreement) is not None:
        print(f"a person agrees in {agreement.share.text()}; corrected by that it wins {agreement.corrected.text()}")
    print(f"it {'passes' if evidence.passes else 'does not pass'} a bar of {evidence.min_win_rate:.3g}")
    print(f"sha256 of {file}: {hashlib.sha256(file.read_bytes()).hexdigest()}")
    return Exit.DONE
