"""The images: what they copy is there, what they install is pinned, and a SIGTERM reaches what they run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.fakes.dockerfile import DOCKER, values
from tests.fakes.process import ROOT

IMAGES = ("flow", "train", "serve")
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PACKAGES = [name.removesuffix("*") for name in SETUPTOOLS["packages"]["find"]["include"]]
VLLM_PYTHON = ROOT / ".venv-serve" / "bin" / "python"


@pytest.mark.parametrize("image", IMAGES)
def test_what_is_copied_is_there(image: str) -> None:
    for value in values(image, "COPY"):
        *sources, _ = value.split()
        for source in sources:
            assert (ROOT / source).exists(), source


def test_only_what_is_copied_is_sent_to_a_build() -> None:
    """Everything else may hold secrets: .env, .git, a workspace, Terraform's state."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    sent = tuple(line.removeprefix("!") for line in lines if line.startswith("!"))
    copied = [source for image in IMAGES for value in values(image, "COPY") for source in value.split()[:-1]]
    assert all(source.startswith(sent) for source in copied)
    assert not [path for path in sent if not any(source.startswith(path) for source in copied)]


@pytest.mark.parametrize("image", IMAGES)
def test_it_is_no_root_hears_signals_and_starts_from_a_pinned_image(image: str) -> None:
    """A shell as PID 1 would swallow the SIGTERM. `tini -g` would send it past Prefect's supervisor."""
    assert values(image, "USER")[-1] == "10001:10001"
    (entrypoint,) = (json.loads(value) for value in values(image, "ENTRYPOINT"))
    assert entrypoint in (["tini", "--"], ["/opt/preflow/serve.sh"])
    (base,) = values(image, "FROM")
    assert re.fullmatch(r"[a-z/-]+:v?\d+\.\d+\.\d+(-[a-z]+)*", base)
    assert f"--file=infra/docker/{image}.Dockerfile" in (DOCKER / "cloudbuild.yaml").read_text()


@pytest.mark.parametrize("image", ["flow", "train"])
def test_every_package_is_in_it_and_every_dependency_is_pinned(image: str) -> None:
    assert any("--constraint constraints.txt" in value for value in values(image, "RUN"))
    assert set(PACKAGES) <= {value.split()[0] for value in values(image, "COPY")}
    assert values(image, "RUN")[-1].endswith(f"compileall -q {' '.join(PACKAGES)}")


def test_what_the_packages_hold_besides_code_is_installed_with_them() -> None:
    named = {ROOT / package / path for package, patterns in SETUPTOOLS["package-data"].items()
             for pattern in patterns for path in (ROOT / package).glob(pattern)}  # fmt: skip
    held = {path for package in PACKAGES for path in (ROOT / package).rglob("*.*") if not path.suffix.startswith(".py")}
    assert named == held - {ROOT / "tasks" / "README.md"}


def test_every_direct_dependency_has_a_pin() -> None:
    printed = subprocess.run(
        [sys.executable, DOCKER / "requirements.py", "train"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["dependencies"] + project["optional-dependencies"]["train"]) < set(printed)
    pins = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    names = {re.split(r"[<>=!~\[ ]", line)[0].lower().replace("_", "-") for line in printed if line}
    assert names <= pins


def test_the_vllm_of_the_image_is_that_of_the_package() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["serve"]
    (base,) = values("serve", "FROM")
    assert extra == [f"vllm=={base.split(':v')[1]}"]


def stand_in(folder: Path, program: str) -> dict[str, str]:
    """Put a `vllm` that runs `program` into `folder`; return an environment that finds it."""
    vllm = folder / "vllm"
    vllm.write_text(f"#!{sys.executable}\nimport json, os, signal, sys, time\n{program}")
    vllm.chmod(0o755)
    return {"PATH": f"{folder}:/usr/local/bin:/usr/bin:/bin"}


def serve(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run serve.sh with a vllm that prints its process id and its arguments."""
    path = stand_in(tmp_path, "print(json.dumps([os.getpid(), *sys.argv[1:]]))\n")
    shell = 'echo $$; exec "$0" "$@"'
    return subprocess.run(
        ["sh", "-c", shell, DOCKER / "serve.sh", *arguments],
        env={**path, **environment},
        capture_output=True,
        text=True,
    )


def test_vllm_takes_the_place_of_the_start_script(tmp_path: Path) -> None:
    done = serve(tmp_path, "--seed", "7", MODEL="base", SFT_ADAPTER="/workspace/adapters/sft")
    started, printed = done.stdout.splitlines()
    pid, *given = json.loads(printed)
    assert pid == int(started)
    assert given[:2] == ["serve", "base"]
    assert given[-4:] == ["--lora-modules", "sft=/workspace/adapters/sft", "--seed", "7"]
    assert json.loads(given[given.index("--structured-outputs-config") + 1])["disable_any_whitespace"] is True
    assert {"--enable-lora", "--shutdown-timeout"} <= set(given)


def test_a_restarted_vllm_serves_what_was_promoted(tmp_path: Path) -> None:
    """The pointer holds the flow's address of the adapter; vLLM sees the same folder next to the pointer."""
    adapters = tmp_path / "mount" / "adapters"
    for name, digest, whole in (("live", "c7b2c00699f3aaaa", True), ("torn", "0123456789abcdef", False)):
        folder = adapters / name / digest
        folder.mkdir(parents=True)
        pointer = {"name": name, "current": {"uri": f"gs://bucket/ws/adapters/{name}/{digest}"}, "history": []}
        (adapters / name / "CURRENT.json").write_text(json.dumps(pointer))
        if whole:
            (folder / "COMMITTED.json").write_text("{}")
    (adapters / "cut").mkdir()
    (adapters / "cut" / "CURRENT.json").write_text('{"current": ')
    done = serve(tmp_path, MODEL="base", SFT_ADAPTER="/workspace/sft", ADAPTERS=str(adapters))
    _, *given = json.loads(done.stdout.splitlines()[-1])
    loras = given[given.index("--lora-modules") + 1 :]
    assert loras == ["sft=/workspace/sft", f"live={adapters}/live/c7b2c00699f3aaaa"]
    assert "cut/CURRENT.json: damaged" in done.stderr
    assert "0123456789abcdef: has no COMMITTED.json" in done.stderr


def test_vllm_speaks_with_the_chat_template_of_the_training(tmp_path: Path) -> None:
    adapter = tmp_path / "sft"
    adapter.mkdir()
    environment = {"MODEL": "base", "SFT_ADAPTER": str(adapter)}
    assert "--chat-template" not in serve(tmp_path, **environment).stdout
    (adapter / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0] }}"}')
    given = json.loads(serve(tmp_path, **environment).stdout.splitlines()[1])
    assert Path(given[given.index("--chat-template") + 1]).read_text() == "{{ messages[0] }}"
    template = adapter / "chat_template.jinja"
    template.write_text("{{ messages }}")
    given = json.loads(serve(tmp_path, **environment).stdout.splitlines()[1])
    assert given[given.index("--chat-template") + 1] == str(template)
    given = json.loads(serve(tmp_path, **environment, CHAT_TEMPLATE="/other.jinja").stdout.splitlines()[1])
    assert given[given.index("--chat-template") + 1] == "/other.jinja"


@pytest.mark.parametrize("broken", ["no chooser", "bad adapter"])
def test_vllm_is_not_started_where_the_template_cannot_be_chosen(tmp_path: Path, broken: str) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "tokenizer_config.json").write_text("{" if broken == "bad adapter" else "{}")
    script = DOCKER / "serve.sh"
    if broken == "no chooser":
        script = Path(shutil.copy(script, tmp_path))
        shutil.copy(DOCKER / "served_adapters.py", tmp_path)
    environment = stand_in(tmp_path, "print('started')\n") | {"MODEL": "base", "SFT_ADAPTER": str(tmp_path / "sft")}
    done = subprocess.run(["sh", script], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "started" not in done.stdout
    assert ("choose_template.py" if broken == "no chooser" else "JSONDecodeError") in done.stderr


DRAINING = """
def drain(*_):
    os.write(1, b"draining %d" % os.getpid())
    os._exit(0)
signal.signal(signal.SIGTERM, drain)
os.write(1, b"up\\n")
time.sleep(600)
"""
NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child"]


def can_be_pid_1() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not can_be_pid_1(), reason="this user may not make a process namespace")
def test_as_pid_1_vllm_gets_the_sigterm(tmp_path: Path) -> None:
    """In a pod the start script is process 1, to which the kernel passes no signal that it does not handle."""
    environment = {**stand_in(tmp_path, DRAINING), "MODEL": "base"}
    outer = subprocess.Popen([*NAMESPACE, DOCKER / "serve.sh"], env=environment, stdout=subprocess.PIPE, text=True)
    assert outer.stdout is not None
    assert outer.stdout.readline() == "up\n"
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)
    assert outer.stdout.read() == "draining 1"
    assert outer.wait(60) == 0


PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = make_arg_parser(FlexibleArgumentParser())
given = parser.parse_args(sys.argv[1:])
print(json.dumps([given.model_tag, given.enable_lora, given.shutdown_timeout, [a.name for a in given.lora_modules]]))
parser.parse_args([*sys.argv[1:], "--enable-loras-please"])
"""


@pytest.mark.long  # starts vLLM
@pytest.mark.slow  # vLLM is imported
@pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="make .venv-serve/ready installs vLLM")
def test_vllm_knows_every_flag(tmp_path: Path) -> None:
    """Its own parser reads what the start script hands on, and refuses what it does not know."""
    told = json.loads(serve(tmp_path, MODEL="base", SFT_ADAPTER="/sft").stdout.splitlines()[1])[2:]
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run([VLLM_PYTHON, "-c", PARSE, *told], env=environment, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == ["base", True, 20, ["sft"]], done.stderr
    assert done.returncode == 2
    assert "unrecognized arguments: --enable-loras-please" in done.stderr
