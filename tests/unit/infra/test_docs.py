"""The commands of infra/README.md: they can be read by a shell, name what is there, and start a run that is valid."""

import json
import os
import re
import subprocess
from pathlib import Path

import yaml

from tasks.config import PipelineConfig, TrainingConfig
from tests.fakes.process import ROOT

TEXT = (ROOT / "infra" / "README.md").read_text()
SECTIONS = {part.split("\n", 1)[0]: part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]}


def commands(section: str) -> str:
    """Return the first block of commands of a section."""
    found = re.search(r"```bash\n(.*?)```", SECTIONS[section], re.DOTALL)
    assert found is not None
    return found.group(1)


def run_with_stand_ins(script: str, folder: Path, *tools: str) -> list[list[str]]:
    """Run commands with tools that only write down how they were called."""
    script_of_tool = "#!/bin/sh\nfor word; do printf '%s\\0' \"$word\"; done >>$0.said\necho >>$0.said\n"
    for tool in tools:
        (folder / tool).write_text(script_of_tool)
        (folder / tool).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "BUCKET": "my-bucket"}
    subprocess.run(["bash", "-euc", script], env=environment, cwd=folder, check=True)
    said = [path.read_text() for path in sorted(folder.glob("*.said"))]
    return [call.strip("\0\n").split("\0") for calls in said for call in calls.split("\0\n") if call]


def test_the_outputs_that_they_evaluate_exist() -> None:
    outputs = (ROOT / "infra" / "gcp" / "outputs.tf").read_text()
    named = re.findall(r"output -raw (\w+)", commands("On GKE"))
    assert len(named) == 5
    for name in named:
        assert f'output "{name}"' in outputs


def test_the_last_one_starts_a_valid_run_of_the_whole_pipeline(tmp_path: Path) -> None:
    script = commands("On GKE").split("# 10. ")[1].split("\n", 1)[1]
    (call,) = run_with_stand_ins(script, tmp_path, "kubectl")
    assert call[:4] == ["-n", "preflow", "exec", "deploy/flow-worker"]
    assert call[call.index("--") + 1 :][:4] == ["prefect", "deployment", "run", "dpo-pipeline/local"]
    given = json.loads(call[-1].removeprefix("config="))
    config = PipelineConfig.model_validate(given).filled()
    assert config.workspace == "gs://my-bucket/runs"
    assert config.judging.rubric, "else the run ends before it begins"
    assert config.evaluation.generation is not None
    assert config.evaluation.generation.api_key == config.promotion.api_key == "env:VLLM_API_KEY"
    assert config.evaluation.adapter_root == config.promotion.adapter_root == "/workspace/runs"
    deployed = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
    trainers = [item for item in deployed if "train.py" in item["entrypoint"]]
    assert config.training_deployment in {f"train-dpo/{item['name']}" for item in trainers}


def test_what_modal_is_asked_to_train_is_valid(tmp_path: Path) -> None:
    calls = run_with_stand_ins(
        "\n".join(line for line in commands("On Modal").splitlines() if line.startswith("modal run")), tmp_path, "modal"
    )
    ((*_, function, _, _, _, training),) = calls
    assert function == "infra/modal/app.py::train"
    TrainingConfig.model_validate_json(training)
