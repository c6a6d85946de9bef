"""Draw docs/architecture.md from the imports of the code: `python -m tests.benchmarks.draw_architecture`."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn by tests/benchmarks/draw_architecture.py -->", "<!-- end -->"
# Everybody imports them; their arrows would hide the others.
EVERYWHERE = ("config", "errors", "store")


def folder_of(module: str) -> str | None:
    """Return the folder that a module of ours belongs to."""
    first, *rest = module.split(".")
    if first == "tasks":
        return rest[0] if rest else None
    return first if first in ("flows", "preflow") else None


def arrows() -> dict[str, set[str]]:
    """Return, for each folder, those that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for package in ("flows", "preflow", "tasks"):
        for path in (ROOT / package).rglob("*.py"):
            here = folder_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                for there in map(folder_of, modules):
                    if here and there and there not in (here, *EVERYWHERE) and here not in EVERYWHERE:
                        found[here].add(there)
    return found


def draw() -> str:
    """Return the picture, as mermaid."""
    found = arrows()
    lines = [f"    {here} --> {there}" for here in sorted(found) for there in sorted(found[here])]
    return "```mermaid\nflowchart TD\n" + "\n".join(lines) + "\n```"


def main() -> None:
    """Write it into the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{draw()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
