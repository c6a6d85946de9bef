"""Imports point one way, and what does not train starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate"}
STAGES = {"generate", "judge", "train", "trainer", "evaluate", "promote"}


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def test_tasks_import_no_flow() -> None:
    for path in (ROOT / "tasks").rglob("*.py"):
        assert not any(name.split(".")[0] == "flows" for name in imports(path)), path


def test_only_training_and_the_demo_import_torch() -> None:
    for path in [*(ROOT / "tasks").rglob("*.py"), *(ROOT / "flows").rglob("*.py")]:
        if path.relative_to(ROOT).parts[1] not in ("trainer", "demo"):
            assert not {name.split(".")[0] for name in imports(path)} & HEAVY, path


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stages_do_not_import_each_other(stage: str) -> None:
    files = list((ROOT / "tasks" / stage).rglob("*.py"))
    assert files
    for file in files:
        others = {name.split(".")[1] for name in imports(file) if name.startswith("tasks.")} & (STAGES - {stage})
        if stage == "trainer":  # the child of `train`: it reads its parent's specification and invariants
            others.discard("train")
        assert not others, f"{file} imports {others}"


@pytest.mark.parametrize("module", ["flows.pipeline", "tasks.train.launch"])
def test_flows_start_without_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_flow_is_a_table_of_contents() -> None:
    for path in (ROOT / "flows").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 40, f"{path}:{node.lineno} {node.name}"
