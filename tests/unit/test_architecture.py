"""Imports point one way, and what does not train starts without torch."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate"}
BASE = {"config", "errors", "store"}
STAGE = BASE | {"llm", "batch", "report"}
OTHERS = {*BASE, *STAGE, "trainer", "run", "sweep", "rounds", "demo", "drill"}
FOLDERS = {path.parent.name for path in (ROOT / "tasks").glob("*/*.py")}
STAGES = FOLDERS - OTHERS
# What the modules of each folder may import, besides their own: flows -> a stage's folder -> batch, llm, report ->
# store -> config, errors. Stages do not import each other.
MAY_IMPORT = {
    "config": {"errors"},
    "store": {"config", "errors"},
    "llm": BASE,
    "batch": BASE | {"llm"},
    "report": BASE | {"batch"},
    **dict.fromkeys(STAGES, STAGE),
    # The child of `train`: it reads its parent's specification and invariants.
    "trainer": STAGE | {"train"},
    "run": STAGE | STAGES,
    "sweep": STAGE | STAGES | {"run"},
    "rounds": STAGE | STAGES | {"run"},
    "demo": STAGE | STAGES | {"run"},
    "drill": STAGE | STAGES | {"trainer", "demo"},
}


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def test_tasks_import_no_flow_and_nothing_imports_the_command() -> None:
    for package, above in (("tasks", {"flows", "preflow"}), ("flows", {"preflow"})):
        for path in (ROOT / package).rglob("*.py"):
            assert not {name.split(".")[0] for name in imports(path)} & above, path


def test_only_training_and_the_demo_import_torch() -> None:
    for path in [*(ROOT / "tasks").rglob("*.py"), *(ROOT / "flows").rglob("*.py")]:
        if path.relative_to(ROOT).parts[1] not in ("trainer", "demo"):
            assert not {name.split(".")[0] for name in imports(path)} & HEAVY, path


def folder_of(module: str) -> str:
    """Return the folder below tasks/ that a module is in, or the module itself at the root."""
    return module.split(".")[1] if module.startswith("tasks.") else ""


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_imports_point_one_way(folder: str) -> None:
    """A folder that is not named is a stage."""
    allowed = MAY_IMPORT[folder]
    files = list((ROOT / "tasks" / folder).rglob("*.py"))
    assert files
    for file in files:
        used = {folder_of(name) for name in imports(file)} - {"", folder}
        assert used <= allowed, f"{file} imports {used - allowed}"


def test_no_module_is_in_a_circle() -> None:
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "tasks").rglob("*.py")}
    graph = {name.removesuffix(".__init__"): {used for used in imports(path) if used in files} - {name}
             for name, path in files.items()}  # fmt: skip
    TopologicalSorter(graph).prepare()


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
