"""The command as a person types it: help that fits a screen, errors in one line, exit codes."""

import errno
import json
import logging
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import proxy_bypass

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from preflow import cli
from preflow.cli import COMMANDS, Exit, main
from preflow.settings import load_settings
from tasks.errors import PreflowError

WIDTH, HEIGHT = 80, 24
KEY = "sk-abcdefghijklmnopqrstuvwxyz123456"


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_a_screen(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    assert main([*filter(None, [name]), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 3 < len(lines) <= (HEIGHT if name else 40)
    assert max(map(len, lines)) <= WIDTH
    assert "Exit codes" in "".join(lines) or name


def test_help_needs_neither_prefect_nor_torch() -> None:
    code = "import sys; from preflow.cli import main; main(['--help']); print({'prefect', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "set()"


FILES = {
    "ok.yaml": b"prompts: p.jsonl\n",
    "tabs.yaml": b"prompts: p\ntraining:\n\tbeta: 0.1\n",
    "list.yaml": b"- a\n",
    "section.yaml": b"prompts: p\ntraining: [1]\nsweep: 5\n",
    "unknown.yaml": b"training:\n  betta: 0.1\n  nonsense: 3\n",
    "utf16.yaml": "prompts: p\n".encode("utf-16"),
    "nul.yaml": b"prompts: \0\n",
    "twice.yaml": b"beta: 1\nbeta: 2\n",
    "date.yaml": b"prompts: 2026-13-45\n",
    "rows.jsonl": b'{"prompt": "x"}\n',
    "unfinished/x": b"",
    "adapter/adapter_config.json": b"{}",
    "p.jsonl": b'{"prompt": [{"role": "user", "content": "x"}]}\n',
    "runs/k/result.json": b"{",
    "runs/k/config.json": b"{}",
}


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("run", "config.yaml: no such file; `preflow init config.yaml` writes one"),
        ("nonsense", "nonsense"),
        ("run --nonsense", "--nonsense"),
        ("params tabs.yaml", "tabs.yaml:3: not YAML: found character that cannot start any token; indent with spaces"),
        ("params list.yaml", "list.yaml: must hold settings such as"),
        ("params section.yaml", "section.yaml:2: training: must be a section, with settings in it"),
        ("params section.yaml", "section.yaml:3: sweep: must be a section, with settings in it"),
        ("params unknown.yaml", "unknown.yaml:2: there is no setting training.betta; did you mean training.beta?"),
        ("params unknown.yaml", "unknown.yaml:3: there is no setting training.nonsense; `preflow schema` has all"),
        ("params unfinished", "unfinished: is a folder; name the config.yaml in it"),
        ("params utf16.yaml", "utf16.yaml: not text in UTF-8: save it in that encoding"),
        ("params nul.yaml", "nul.yaml:1: not YAML: "),
        ("params twice.yaml", "twice.yaml:2: not YAML: found duplicate key"),
        ("params date.yaml", "date.yaml:1: not YAML: month must be in 1..12"),
        ("params ok.yaml --set training.beta", "--set training.beta: write it as training.beta=0.05"),
        ("params ok.yaml --set training..beta=3", "--set training..beta=3: write it as training.beta=0.05"),
        ("params ok.yaml --set training.bta=3", "--set: there is no setting training.bta; did you mean training.beta?"),
        ("params ok.yaml --set training=3", "--set: training: must be a section"),
        ("params ok.yaml --set judging.orders=9", "ok.yaml:1: judging.orders (9) is more than"),
        ("params ok.yaml --set prompts.x=3", "--set prompts.x: prompts is no section: it has no settings in it"),
        ("convert unfinished", "unfinished: a folder that holds no table of `datasets`. Give the path of a JSONL"),
        ("convert rows.jsonl --show -1", "--show"),
        ("init ok.yaml/config.yaml", "ok.yaml/config.yaml: cannot be written: "),
        ("init ok.yaml", "ok.yaml is there already: give another name, or --force"),
        ("evidence unfinished", "unfinished: holds no finished run; name its folder"),
        ("report runs/k", "result.json: damaged"),
        ("verify unfinished", "unfinished: cannot be read: Is a directory; `preflow evidence` writes it"),
        ("promote ok.yaml --set training.sft_adapter=adapter", "adapter: holds no .safetensors weights"),
        ("chat --endpoint localhost", "--endpoint: must be an address such as http://host:8000/v1"),
        (f"chat --api-key {KEY}", "--api-key: must name a secret"),
        ("chat --api-key env:UNSET_X", "--api-key names env:UNSET_X, but it is not set or empty"),
        ("up --folder x", "Invalid value for UI_PORT from env"),
        ("up --ui-port 70000", "--ui-port"),
        ("up --ui-port 0", "--ui-port"),
        ("up --ui-port 4200 --vllm-port 0", "--vllm-port"),
        ("up --ui-port 4200 --judge-port 0", "--judge-port"),
        ("up --ui-port 31999 --vllm-port 31999", "port 31999 is for the Prefect UI and vLLM: choose another one with"),
        ("label ok.yaml --port 70000", "--port"),
        ("label unfinished/config.yaml --port 0", "unfinished/config.yaml: no such file"),
        ("drill --preemptions 0", "--preemptions 0 do not fit --steps 40: take more steps"),
        ("drill --set beta", "--set beta: write it as beta=0.05"),
        ("drill --deployment nope", "there is no Prefect server: `preflow up`, or export PREFECT_API_URL="),
        ("drill --pairs nope.jsonl --workspace w", "pairs nope.jsonl: no such file; give the train.jsonl of"),
    ],
)  # fmt: skip
def test_what_a_person_can_fix_is_one_message_with_a_remedy(
    tmp_path: Path, typed: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UI_PORT", "nan")
    # Prefect's handler holds the output of the test in which it was made, which is closed by now.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):  # other tests of this process may have a server
        code, shown = main(typed.split()), "".join(capsys.readouterr())
    assert code == Exit.WRONG, shown
    assert said in shown
    assert "Traceback" not in shown
    assert KEY not in shown
    assert len(shown.splitlines()) <= 5


def test_a_port_in_use_is_said_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("UI_PORT", str(taken.getsockname()[1]))
        assert main(["up", "--folder", str(tmp_path)]) == Exit.WRONG
    assert "is taken by another program: end that, or choose another port with UI_PORT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("promotion", "said"),
    [
        ({}, "`preflow chat` talks to what is served"),
        ({"endpoint": "http://127.0.0.1:9000/v1"}, "`preflow chat --endpoint http://127.0.0.1:9000/v1` talks"),
        ({"endpoint": None, "api_key": "env:KEY"}, "`preflow chat --api-key env:KEY` talks"),
    ],
)
def test_up_says_how_to_talk_to_what_is_served(
    promotion: dict[str, str | None], said: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "serving.json").write_text(json.dumps({"name": "demo", "config": {"promotion": promotion}}))
    monkeypatch.setattr("tasks.demo.up.Up.api", lambda running: "http://127.0.0.1:4200/api")
    assert main(["up", "--folder", str(tmp_path)]) == Exit.DONE
    assert said in capsys.readouterr().out


def test_up_says_when_what_runs_has_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, told = tmp_path / "config.yaml", tmp_path / ".preflow" / "run" / "serving.json"
    file.write_text("prompts: p.jsonl\n")
    settings = load_settings(file)
    monkeypatch.setattr("tasks.demo.up.Up.api", lambda running: "http://127.0.0.1:4200/api")
    told.parent.mkdir(parents=True)
    for changes, said in (
        ((), "it runs already:"),
        (("training.beta=0.2",), "with other settings: `preflow down` first"),
    ):
        settings = load_settings(file, changes)
        told.write_text(json.dumps({"name": settings.config.promotion.name, **settings.parameters(sweep=True)}))
        assert main(["up", str(file)]) == Exit.DONE
        assert said in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run c.yaml", "run c.yaml --on dpo-pipeline/local", "rollback c.yaml"])
def test_a_prefect_that_does_not_answer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "c.yaml").write_text("prompts: p.jsonl\n")
    monkeypatch.chdir(tmp_path)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert main(command.split()) == Exit.WRONG
    assert "PREFECT_API_URL is http://127.0.0.1:9/api, and no Prefect answers there" in capsys.readouterr().err


def test_what_runs_here_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    assert main(["--version"]) == Exit.DONE
    assert all(map(proxy_bypass, ("127.0.0.1:4200", "localhost", "inside.example")))
    assert not proxy_bypass("outside.example")
    monkeypatch.setenv("no_proxy", "*")
    assert main(["--version"]) == Exit.DONE
    assert proxy_bypass("outside.example"), "no proxy at all is asked for"


def test_a_reader_that_has_read_enough_is_no_defect() -> None:
    with subprocess.Popen([sys.executable, "-m", "preflow", "schema"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == Exit.INTERRUPTED


def test_ctrl_c_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a sub-command: cyclopts would leave without a word."""
    monkeypatch.setattr("preflow.commands.files.json.dumps", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert main(["schema"]) == Exit.INTERRUPTED
    assert capsys.readouterr().err == "stopped; run it again, and it continues where it was\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PreflowError("prompts.jsonl:3: not JSON"), Exit.WRONG, "prompts.jsonl:3: not JSON"),
        (BrokenPipeError("of a server"), Exit.DEFECT, "a defect of preflow: BrokenPipeError: of a server."),
        (ZeroDivisionError("x"), Exit.DEFECT, "a defect of preflow: ZeroDivisionError: x. The traceback is in"),
        (OSError(errno.ENOSPC, "No space left on device", "/w/x"), Exit.WRONG, "/w/x: No space left on device: make"),
        (OSError(errno.EMFILE, "Too many open files"), Exit.WRONG, "a file: Too many open files: raise `ulimit -n`"),
        (PermissionError(errno.EACCES, "Permission denied", "/w/x"), Exit.WRONG, "/w/x: Permission denied: give"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("has_room", [True, False])
def test_errors_are_one_line_and_have_their_code(
    error: BaseException, code: Exit, said: str, has_room: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def app(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path if has_room else tmp_path / "none"))
    monkeypatch.setattr(cli, "make_app", lambda: app)
    assert main([]) == code
    shown = capsys.readouterr().err
    assert said.removesuffix(" The traceback is in") in shown
    assert len(shown.splitlines()) == 1
    if code is Exit.DEFECT:
        assert ("The traceback is in" if has_room else "set TMPDIR to a folder with room") in shown
    assert (tmp_path / "preflow-error.log").exists() == (code is Exit.DEFECT and has_room)
