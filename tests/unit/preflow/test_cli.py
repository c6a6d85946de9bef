"""The command as a person types it: help that fits a screen, errors in one line, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

from preflow import cli
from preflow.cli import COMMANDS, Exit, main
from tasks.errors import PreflowError

WIDTH, HEIGHT = 80, 40


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_a_screen(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    assert main([*filter(None, [name]), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 3 < len(lines) <= HEIGHT
    assert max(map(len, lines)) <= WIDTH
    assert "Exit codes" in "".join(lines) or name


def test_help_needs_neither_prefect_nor_torch() -> None:
    code = "import sys; from preflow.cli import main; main(['--help']); print({'prefect', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "config.yaml: no such file"), (["nonsense"], "nonsense"), (["run", "--nonsense"], "--nonsense"),
        (["params", "--set", "beta"], "no such file"),
    ],
)  # fmt: skip
def test_what_a_person_can_fix_is_said_without_a_traceback(
    tmp_path: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == Exit.WRONG
    shown = "".join(capsys.readouterr())
    assert said in shown
    assert "Traceback" not in shown


def test_ctrl_c_says_what_to_do(tmp_path: Path) -> None:
    """In the middle of a sub-command: cyclopts would leave without a word."""
    code = "import preflow.commands.schema as s, signal, os\n"
    code += "def schema(): os.kill(os.getpid(), signal.SIGINT)\n"
    code += "s.schema = schema; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from preflow.cli import main; raise SystemExit(main(['schema']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == Exit.INTERRUPTED
    assert done.stderr.splitlines() == ["stopped; run it again, and it continues where it was"]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PreflowError("prompts.jsonl:3: not JSON"), Exit.WRONG, "prompts.jsonl:3: not JSON"),
        (ZeroDivisionError("x"), Exit.DEFECT, "a defect of preflow: ZeroDivisionError: x. The traceback is in"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_have_their_code(
    error: BaseException, code: Exit, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def app(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(cli, "make_app", lambda: app)
    assert main([]) == code
    shown = capsys.readouterr().err
    assert said in shown
    assert len(shown.splitlines()) == 1
    assert (tmp_path / "preflow-error.log").exists() == (code is Exit.DEFECT)
