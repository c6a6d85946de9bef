"""Print the adapters that vLLM serves from the start, NAME=FOLDER a line: the SFT adapter, and what was promoted.

    served_adapters.py ADAPTERS SFT_ADAPTER        either may be empty

ADAPTERS is <workspace>/adapters as this machine sees it. A CURRENT.json names its adapter by an address in the
workspace; the last part of it is the adapter's folder next to that file. Standard library only.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path


def served(adapters: str, sft: str) -> Iterator[str]:
    """Yield NAME=FOLDER for each adapter; a promoted one that is not whole is left out, with a warning."""
    if sft:
        yield f"sft={sft}"
    for pointer in sorted(Path(adapters).glob("*/CURRENT.json")) if adapters else []:
        try:
            uri = json.loads(pointer.read_text())["current"]["uri"]
        except (ValueError, KeyError, TypeError) as error:
            print(f"{pointer}: damaged ({type(error).__name__}), not served; promote again", file=sys.stderr)
            continue
        folder = pointer.parent / uri.rstrip("/").rsplit("/", 1)[-1]
        if (folder / "COMMITTED.json").is_file():
            yield f"{pointer.parent.name}={folder}"
        else:
            print(f"{folder}: has no COMMITTED.json, not served; promote again", file=sys.stderr)


if __name__ == "__main__":
    print("\n".join(served(sys.argv[1], sys.argv[2])))
