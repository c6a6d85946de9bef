"""What a person sees of each deployment's run: its log and its name, on the server and from the command line."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prefect.deployments import run_deployment

from tests.deployed import Api, process_worker
from tests.fakes.process import ROOT, FakeOpenAI
from tests.fakes.tiny_training import build_adapter, build_base

SECONDS = 300.0

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]  # runs through a worker; the end-to-end run has one of each


@dataclass
class World:
    """A server with all deployments, a worker that was started elsewhere, and endpoints."""

    folder: Path
    url: str
    sampler: FakeOpenAI
    judge: FakeOpenAI

    @property
    def workspace(self) -> str:
        return str(self.folder / "workspace")

    def config(self) -> dict[str, Any]:
        """Return a whole run of a tiny model."""
        return {
            "prompts": str(self.folder / "prompts.jsonl"),
            "eval_prompts": str(self.folder / "held-out.jsonl"),
            "workspace": self.workspace,
            "generation": {"endpoint": self.sampler.url, "model": "sft", "max_tokens": 64},
            "judging": {
                "endpoint": self.judge.url, "model": "judge-oracle", "api_key": None, "rubric": "neutral",
                "prompt_price": 0.3,
            },
            "training": {
                "base_model": str(self.folder / "base"), "sft_adapter": str(self.folder / "sft"), "load_in_4bit": False,
                "bf16": False, "gradient_checkpointing": False, "learning_rate": 1e-3, "max_steps": 4,
                "warmup_steps": 1, "max_length": 256, "gradient_accumulation_steps": 2,
            },
            "evaluation": {"num_samples": 2, "null_test": False},
            "promotion": {"name": "better", "endpoint": None, "min_win_rate": 0.0},
        }  # fmt: skip

    def made(self, stage: str) -> str:
        """Return the folder of a stage's newest artifact."""
        manifests = Path(self.workspace).glob(f"{stage}/*/manifest.json")
        return str(max(manifests, key=lambda path: path.stat().st_mtime).parent)

    def run(self, deployment: str, name: str | None = None, **parameters: Any) -> "Run":
        """Run a deployment to its end, as the command line and the UI do."""
        found = run_deployment(
            deployment, parameters=parameters, timeout=SECONDS, poll_interval=0.5, flow_run_name=name, as_subflow=False
        )
        return Run(found.name, found.state.type.value, Api(self.url).log(str(found.id)))


@dataclass
class Run:
    """What the server has of a run."""

    name: str
    state: str
    lines: list[tuple[int, str]]

    @property
    def text(self) -> str:
        return "\n".join(message for _, message in self.lines)

    @property
    def errors(self) -> list[str]:
        return [message for level, message in self.lines if level >= 40]


@pytest.fixture(scope="module")
def world(registered_prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("logs")
    build_adapter(folder / "sft", build_base(folder / "base"))
    for name, place, count in (("prompts", "CAFE", 24), ("held-out", "KITCHEN", 6)):
        rows = [{"prompt": [{"role": "user", "content": f"INT. {place} - SCENE {n}"}]} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (
        pytest.MonkeyPatch.context() as environment,
        FakeOpenAI({"oracle_every": 3, "base": str(folder / "base")}, folder / "sampler") as sampler,
        FakeOpenAI({}, folder / "judge") as judge,
    ):
        environment.setenv("PREFECT_LOGGING_TO_API_ENABLED", "true")
        with process_worker(folder):
            yield World(folder, registered_prefect_server, sampler, judge)


def test_the_pipeline_tells_its_progress_its_spending_and_its_verdict(world: World) -> None:
    run = world.run("dpo-pipeline/local", name="my run with all defaults", config=world.config())
    assert run.state == "COMPLETED", run.text
    assert run.name == "my run with all defaults", "the name that was typed is gone"
    for pattern in (r"sft answers", r"The whole report: .*report\.html"):
        assert re.search(pattern, run.text), run.text
    assert run.errors == []


STAGES = {
    "generate-completions/local": ("prompts", "generation", r"24 prompts|generation.*done|100 %"),
    "judge-preferences/local": ("completions", "judging", r"(?s)48 requests.*US\$.*preferences: .*rows gave a pair"),
    "train-dpo/local": ("preferences", "training", r"step \d+/4"),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_is_run_alone_tells_what_it_does(world: World, name: str) -> None:
    """It is loaded by its file's path, in a folder that is not the checkout."""
    source, stage, said = STAGES[name]
    config = world.config()
    given = config["prompts"] if source == "prompts" else world.made(source)
    settings = {**config[stage], "seed": 5}  # nothing of it is known
    run = world.run(name, workspace=world.workspace, **{source: given, stage: settings})
    assert run.state == "COMPLETED", run.text
    assert re.search(said, run.text), run.text
    assert not re.search(r"^\w+-\w+$", run.name), "a name that tells nothing"


def test_serving_tells_from_what_to_what(world: World) -> None:
    common = {"workspace": world.workspace, "promotion": world.config()["promotion"]}
    adapter = world.made("training")
    evaluated = world.run(
        "evaluate-adapter/local", adapter=adapter, prompts=world.config()["eval_prompts"], workspace=world.workspace,
        evaluation={**world.config()["evaluation"], "generation": world.config()["generation"],
                    "judging": world.config()["judging"]},
    )  # fmt: skip
    assert re.search(r"win rate", evaluated.text), evaluated.text
    promoted = world.run("promote-adapter/local", adapter=adapter, evaluation=world.made("evaluations"), **common)
    assert re.search(r"better is now adapter \w{12}", promoted.text), promoted.text
    back = world.run("rollback-adapter/local", **common)
    assert re.search(r"better: \w{12} \(win rate [\d.]+ %\) -> \w{12} \(win rate [\d.]+ %\)", back.text), back.text
    pages = Api(world.url).post("/artifacts/latest/filter", {})
    assert "was rolled back" in next(page["data"] for page in pages if page["key"] == "rollback")
    nothing = world.run("reconcile-served/local", **common)
    assert nothing.errors == ["promotion.endpoint is empty: give the address of the vLLM that is to serve the adapter"]


def test_an_error_of_the_user_is_one_message_in_the_log(world: World) -> None:
    config = world.config()
    run = world.run("dpo-pipeline/local", config={**config, "judging": {**config["judging"], "orders": 10}})
    assert run.state == "FAILED"
    (error,) = run.errors
    assert re.search(r"judging\.orders \(10\) is more than", error), run.text
    assert "Traceback" not in run.text
    assert "pydantic" not in run.text


def preflow(world: World, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command on the world's configuration, in another folder than the file's."""
    command, *rest = arguments
    file = world.folder / "config.yaml"
    file.write_text(json.dumps(world.config()))  # JSON is YAML
    return subprocess.run(
        [sys.executable, "-m", "preflow", command, str(file), *rest], cwd="/", capture_output=True, text=True,
        timeout=SECONDS, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_the_command_checks_runs_and_follows_to_the_verdict(world: World) -> None:
    checked = preflow(world, "check")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert re.search(r"cost: about .*US\$", checked.stdout)
    assert re.search(r"proof: 6 held-out prompts x 2 samples", checked.stdout)
    change = ("--set", "training.seed=3")
    followed = preflow(world, "run", "--on", "dpo-pipeline/local", *change)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "/v2/runs/flow-run/" in followed.stdout.splitlines()[0]
    for pattern in (r"sft answers", r"better: it wins .*% of the comparisons \(", r"report: .*report\.html"):
        assert re.search(pattern, followed.stdout), followed.stdout
    asked = len(world.judge.requests())
    here = preflow(world, "run", *change)
    assert here.returncode == 0, here.stdout + here.stderr
    assert here.stdout.splitlines()[1:] == followed.stdout.splitlines()[-2:], "the verdict, and where the report is"
    assert len(here.stdout.splitlines()) + len(here.stderr.splitlines()) <= 10, here.stdout + here.stderr
    assert preflow(world, "report", *change).stdout.splitlines() == here.stdout.splitlines()[1:]
    assert len(world.judge.requests()) == asked, "what was known was asked again"


NO_FILE = ("--set", "prompts=/absent.jsonl")
NOWHERE = "dpo-pipeline/nowhere"
MISTAKES = {
    rf"there is no deployment '{NOWHERE}' here; there are: dpo-pipeline/local": ("run", "--on", NOWHERE),
    r"(?s)/absent\.jsonl: no such file.* ended as Failed": ("run", "--on", "dpo-pipeline/local", *NO_FILE),
    r"/absent\.jsonl: no such file": ("run", *NO_FILE),
    r"no run with the settings of .* has finished": ("report", "--set", "training.seed=77"),
    r"2 to fix; nothing was spent": ("check", "--set", "generation.model=nobody", *NO_FILE),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_what_a_person_can_fix_ends_with_2_and_no_traceback(world: World, said: str) -> None:
    done = preflow(world, *MISTAKES[said])
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(said, done.stdout + done.stderr), done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
