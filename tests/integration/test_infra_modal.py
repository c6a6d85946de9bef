"""The Modal app through the package's own local call: a real training, interrupted as Modal does it; vLLM's start."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tasks.config import TrainingConfig
from tasks.errors import PreflowError
from tasks.store.workspace import AdapterRef, Manifest, Workspace
from tasks.train.launch import run_training, training_key
from tests.deployed import until
from tests.fakes.dockerfile import values
from tests.fakes.process import ROOT
from tests.fakes.tiny_training import TinyWorld

APP = ROOT / "infra" / "modal" / "app.py"
PAIRS = "0123456789abcdef"
pytestmark = pytest.mark.filterwarnings("ignore:.*will not have access to the mounted Volume:UserWarning")


def load_app() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preflow_on_modal", APP)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Volume:
    """A folder as the volume holds it: pairs made elsewhere, and the SFT adapter."""

    def __init__(self, root: Path) -> None:
        self.world = TinyWorld.build(root / "elsewhere")
        self.folder = root / "volume"
        pairs = self.folder / "preferences" / PAIRS
        shutil.copytree(Path(self.world.preferences.uri).parent, pairs)
        artifact = self.world.preferences
        manifest = Manifest(artifact=artifact, stage="preferences", version=1, key=PAIRS, files={})
        (pairs / "manifest.json").write_text(manifest.model_dump_json())
        shutil.copytree(self.world.adapter, self.folder / "adapters" / "sft")

    def training(self) -> str:
        """Return the settings as JSON, but for the adapter, whose place is a default."""
        config = self.world.config(max_steps=60, save_steps=4, eval_steps=50)
        return config.model_dump_json(exclude={"sft_adapter"})


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    return Volume(tmp_path_factory.mktemp("modal"))


@pytest.mark.long  # two processes that train
def test_a_preempted_training_goes_on_from_its_checkpoint(volume: Volume) -> None:
    """Modal sends SIGINT to the process that runs the function, and then makes the same call again."""
    call = f"import app; print(app.train.local({PAIRS!r}, {volume.training()!r}, {str(volume.folder)!r}))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{APP.parent}", "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        [sys.executable, "-c", call], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until(lambda: first.poll() is not None or list(volume.folder.glob("training/*/checkpoints/*/COMMITTED.json")))
    first.send_signal(signal.SIGINT)
    output, errors = first.communicate(timeout=120)
    assert first.returncode == -signal.SIGINT, output + errors
    assert "KeyboardInterrupt" in errors
    (folder,) = volume.folder.glob("training/*")
    assert not (folder / "adapter").exists()

    adapter = AdapterRef.model_validate_json(load_app().train.local(PAIRS, volume.training(), str(volume.folder)))
    assert Path(adapter.uri) == folder / "adapter"
    assert Workspace(str(volume.folder)).is_intact(adapter)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 60
    assert re.search(r"(resum|going on|goes on).*step", (folder / "train.log").read_text())


@pytest.mark.long  # uses the training of the test before
def test_what_was_trained_there_is_found_by_the_pipeline_here(volume: Volume, tmp_path: Path) -> None:
    """`modal volume get` brings the folder of the training; the key that names it is the same on every machine."""
    load_app().train.local(PAIRS, volume.training(), str(volume.folder))
    shutil.copytree(volume.folder / "training", tmp_path / "training")
    config = TrainingConfig.model_validate({**json.loads(volume.training()), "sft_adapter": str(volume.world.adapter)})
    key = training_key(volume.world.preferences, config)
    told: list[object] = []
    adapter = run_training(volume.world.preferences, str(tmp_path), config, key, told.append)
    assert Path(adapter.uri).parent == tmp_path / "training" / key
    assert not told, "it was trained again"


def test_what_is_wrong_is_said_before_the_training(volume: Volume) -> None:
    training = json.dumps({**json.loads(volume.training()), "base_model": "/no/such/folder"})
    with pytest.raises(PreflowError, match="no such folder"):
        load_app().train.local(PAIRS, training, str(volume.folder))


def test_vllm_is_started_with_the_flags_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "told.json"
    vllm = tmp_path / "vllm"
    vllm.write_text(
        f"#!{sys.executable}\nimport json, pathlib, sys\nbeside = pathlib.Path('{told}.new')\n"
        f"beside.write_text(json.dumps(sys.argv[1:]))\nbeside.rename('{told}')\n"
    )
    vllm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("MODEL", "base")
    load_app().serve.local()
    until(told.exists)
    arguments = json.loads(told.read_text())
    assert arguments[:2] == ["serve", "base"]
    assert {"--enable-lora", "--structured-outputs-config"} <= set(arguments)
    assert arguments[arguments.index("--port") + 1] == "8000"


def test_it_is_the_image_and_the_model_server_of_the_cluster() -> None:
    app = load_app()
    (base,) = values("serve", "FROM")
    assert f'from_registry("{base}"' in APP.read_text()
    set_there = dict(pair.split("=", 1) for value in values("serve", "ENV") for pair in shlex.split(value))
    assert set(set_there.items()) - app.SERVE_ENV.items() == {("HOME", "/home/preflow")}
    # All of infra/docker is put there, and what the image has from elsewhere must be named.
    (scripts,) = [value for value in values("serve", "COPY") if "serve.sh" in value]
    for source in scripts.split()[:-1]:
        assert Path(source).parent == Path("infra/docker") or f'"{source}"' in APP.read_text(), source
    assert "infra/docker/train.Dockerfile" in repr(app.train_image)
    assert APP.read_text().count('gpu="L4"') == 2


def test_it_can_be_imported_where_there_is_nothing_else(tmp_path: Path) -> None:
    """Modal puts this one file into the container and imports it there."""
    shutil.copy(APP, tmp_path)
    remote = "import modal; modal.is_local = lambda: False; import app; print(app.SERVE_SH)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", remote], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "/opt/preflow/serve.sh", done.stderr
