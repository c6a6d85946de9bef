"""The whole of preflow with real parts, as deployments on a process pool: every one of them runs here.

A Prefect server, a process worker, vLLM on CPU, the trainer, and the demo's judge over HTTP; only the hub is a fake.
The tests stand in the order in which a user would come to them.
"""

import json
import os
import pty
import re
import secrets
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import StateType

from flows.pipeline import dpo_pipeline
from flows.promote import promote_adapter
from preflow.cli import Exit, main
from tasks.config import (
    EvaluationConfig,
    GenerationConfig,
    JudgingConfig,
    PipelineConfig,
    PromotionConfig,
    TrainingConfig,
)
from tasks.demo.corpus import heldout_prompts, training_prompts
from tasks.demo.services import Service, free_port, judge_server, vllm_server
from tasks.evaluate.labels import labels_uri, record_agreement
from tasks.promote.pointer import PromotionRefused, read_pointer
from tasks.rounds.rounds import RoundsResult
from tasks.store.workspace import PipelineResult, Workspace
from tasks.sweep.ranking import SweepResult
from tests.deployed import process_worker, run_to_the_end
from tests.fakes.hub import FakeHub
from tests.models import demo_adapter, demo_base

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = ROOT / ".venv-serve" / "bin" / "python"

pytestmark = pytest.mark.timeout(1200)


TRAINING = "train-dpo/local"
TOKEN = "hf_" + "t0ken" * 6


@dataclass
class Bench:
    """A machine with everything on it: model, adapter, prompts, servers, deployments, a worker, and a workspace."""

    folder: Path
    vllm: Service
    judge_url: str
    hub: FakeHub

    @property
    def workspace(self) -> Path:
        return self.folder / "workspace"

    def config(self) -> PipelineConfig:
        return PipelineConfig(
            prompts=str(self.folder / "prompts.jsonl"),
            eval_prompts=str(self.folder / "held-out.jsonl"),
            workspace=str(self.workspace),
            generation=GenerationConfig(
                endpoint=self.vllm.base_url, model="sft", num_completions=3, max_tokens=48, frequency_penalty=0.0
            ),
            judging=JudgingConfig(
                endpoint=self.judge_url, model="demo-judge", api_key="env:DEMO_JUDGE_KEY", rubric="demo"
            ),
            training=TrainingConfig(
                base_model=str(self.folder / "base"),
                sft_adapter=str(self.folder / "sft"),
                load_in_4bit=False,
                bf16=False,
                learning_rate=1e-3,
                max_steps=3,
                warmup_steps=1,
                max_length=256,
                logging_steps=1,
                gradient_accumulation_steps=2,
            ),
            training_deployment=TRAINING,
            evaluation=EvaluationConfig(num_samples=2, null_test=False),
            # Three steps of a hardly trained model need not win: what is tested here is the way, not the win.
            promotion=PromotionConfig(name="better", min_win_rate=0.0, endpoint=self.vllm.base_url),
        )

    def promotion(self) -> dict[str, Any]:
        return self.config().promotion.model_dump(mode="json")

    def served(self) -> str:
        """The digest of what the pointer says is served as `better`."""
        pointer = read_pointer(str(self.workspace), "better")
        assert pointer is not None
        return str(pointer.current.adapter_sha256)

    def made(self, stage: str) -> set[Path]:
        """The folders of a stage's finished artifacts."""
        return {manifest.parent for manifest in self.workspace.glob(f"{stage}/*/manifest.json")}

    def judge_requests(self) -> int:
        log = self.folder / "judge-requests.jsonl"
        return sum("/chat/completions" in line for line in log.read_text().splitlines())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, registered_prefect_server: str) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bench")
    demo_base(folder / "base")
    demo_adapter(folder / "sft", seed=7)
    for name, rows in (("prompts", training_prompts(24, 7)), ("held-out", heldout_prompts(10, 7))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    key = secrets.token_hex(8)
    vllm = vllm_server(VLLM_PYTHON, folder / "base", folder / "vllm.log", {"sft": folder / "sft"})
    with ExitStack() as stack:
        hub = stack.enter_context(FakeHub(TOKEN))
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        # Large files go by git-lfs then; what hf_xet speaks with its own servers is not faked.
        secret = {"DEMO_JUDGE_KEY": key, "HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        for name, value in secret.items():
            environment.setenv(name, value)
        judge = stack.enter_context(judge_server(folder, key))
        stack.enter_context(vllm)
        stack.enter_context(process_worker(folder))
        yield Bench(folder, vllm, f"http://127.0.0.1:{judge.port}/v1", hub)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stages(bench: Bench) -> set[Path]:
    """What the first two stages make when each is run alone: completions and preference pairs."""
    config = bench.config().filled()
    await run_to_the_end(
        "generate-completions/local", prompts=config.prompts, workspace=config.workspace,
        generation=config.generation.model_dump(mode="json"),
    )  # fmt: skip
    (completions,) = bench.made("completions")
    await run_to_the_end(
        "judge-preferences/local", completions=str(completions), workspace=config.workspace,
        judging=config.judging.model_dump(mode="json"),
    )  # fmt: skip
    return bench.made("completions") | bench.made("preferences")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def result(bench: Bench, stages: set[Path]) -> PipelineResult:
    """What the pipeline made, which left its training to another deployment."""
    await run_to_the_end("dpo-pipeline/local", config=bench.config().model_dump(mode="json"))
    (kept,) = bench.workspace.glob("runs/*/result.json")
    return PipelineResult.model_validate_json(kept.read_text())


def test_the_run_is_whole(bench: Bench, result: PipelineResult) -> None:
    rows = [json.loads(line) for line in Path(result.completions.uri).read_text().splitlines()]
    prompts = [json.loads(line)["prompt"] for line in Path(bench.config().prompts).read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    first = json.loads((Path(result.adapter.uri).parent / "metrics.jsonl").read_text().splitlines()[0])
    assert first["dpo_loss" if "dpo_loss" in first else "loss"] == pytest.approx(0.693147, abs=1e-3)
    assert first["rewards/margins"] == 0
    counts = Workspace(bench.workspace).read_manifest(result.adapter).counts
    assert counts["train_exact"] == 2 * counts["train_used"] > 0, "trained on other tokens than were sampled"
    assert sorted(path.name for path in Path(result.adapter.uri).iterdir()) == [
        "COMMITTED.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
    ]
    assert result.promotion is not None
    assert bench.served() == result.adapter.sha256


def test_its_verdict_is_recomputed_from_one_file(bench: Bench, result: PipelineResult, tmp_path: Path) -> None:
    (kept,) = bench.workspace.glob("runs/*/result.json")
    file = tmp_path / "evidence.json"
    assert main(["evidence", str(kept.parent), "--to", str(file)]) == Exit.DONE
    assert main(["verify", str(file)]) == Exit.DONE
    for private in (str(bench.folder), bench.judge_url, "DEMO_JUDGE_KEY"):
        assert private not in file.read_text()


async def test_it_took_what_the_stages_had_made_and_left_the_training_to_its_deployment(
    bench: Bench, stages: set[Path], result: PipelineResult
) -> None:
    assert {Path(result.completions.uri).parent, Path(result.preferences.uri).parent} == stages
    async with get_client() as client:
        deployment = await client.read_deployment_by_name(TRAINING)
        chosen = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
        (run,) = await client.read_flow_runs(deployment_filter=chosen)
    assert (run.state_type, run.run_count) == (StateType.COMPLETED, 1)


def test_the_promoted_adapter_is_the_one_served(bench: Bench, result: PipelineResult) -> None:
    ids = _prompt_ids(bench, result)
    trained = _log_probs(bench.folder / "base", Path(result.adapter.uri), ids)
    sft = _log_probs(bench.folder / "base", bench.folder / "sft", ids)
    assert _served_log_probs(bench, "better", ids) == pytest.approx(trained, abs=1e-3)
    assert _served_log_probs(bench, "sft", ids) == pytest.approx(sft, abs=1e-3)
    assert trained != pytest.approx(sft, abs=1e-3), "the two adapters are alike, so this test would see no mix-up"


async def test_a_second_run_asks_nobody(bench: Bench, result: PipelineResult) -> None:
    asked, sampled = bench.judge_requests(), _requests_served(bench)
    again = await dpo_pipeline(bench.config())
    assert again == result
    assert (bench.judge_requests(), _requests_served(bench)) == (asked, sampled)


async def test_what_did_not_win_is_not_promoted(bench: Bench, result: PipelineResult) -> None:
    bar = PromotionConfig(name="refused", min_win_rate=0.999, endpoint=bench.vllm.base_url)
    with pytest.raises(PromotionRefused, match="lower bound"):
        await promote_adapter(result.adapter, result.evaluation, bench.config().workspace, bar)
    assert read_pointer(bench.config().workspace, "refused") is None
    assert "refused" not in _served_models(bench)


@pytest.mark.long  # another run
async def test_an_adapter_is_evaluated_by_the_deployment_for_that(bench: Bench, result: PipelineResult) -> None:
    config, before = bench.config().filled(), bench.made("evaluations")
    evaluation = config.evaluation.model_dump(mode="json") | {"num_samples": 1}
    await run_to_the_end(
        "evaluate-adapter/local", adapter=str(Path(result.adapter.uri).parent), prompts=config.eval_prompts,
        workspace=config.workspace, evaluation=evaluation,
    )  # fmt: skip
    (made,) = bench.made("evaluations") - before
    rate = json.loads((made / "win_rate.json").read_text())
    assert rate["samples"] == 10, "one for each held-out prompt"


@pytest.mark.long  # another run
async def test_the_pairs_are_audited_by_the_deployment_for_that(bench: Bench, stages: set[Path]) -> None:
    (pairs,) = bench.made("preferences") & stages
    (completions,) = bench.made("completions") & stages
    run = await run_to_the_end(
        "audit-preferences/local", pairs=str(pairs / "train.jsonl"), completions=str(completions / "completions.jsonl")
    )
    async with get_client() as client:
        shown = await client.read_artifacts(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
    (page,) = [artifact for artifact in shown if artifact.key == "preferences"]
    rows = len((pairs / "train.jsonl").read_text().splitlines())
    assert f"{rows} pairs of {rows} rows" in str(page.data)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def second(bench: Bench, result: PipelineResult) -> PipelineResult:
    """What a sweep makes at another beta."""
    sweep = {"grid": {"training.beta": [bench.config().training.beta, 0.5]}}
    await run_to_the_end("dpo-sweep/local", config=bench.config().model_dump(mode="json"), sweep=sweep)
    (kept,) = bench.workspace.glob("sweeps/*/result.json")
    known, new = SweepResult.model_validate_json(kept.read_text()).points
    assert known.made is not None
    assert known.made.adapter == result.adapter
    assert new.made is not None, new.error
    return new.made


@pytest.mark.long  # a second training
def test_the_sweep_trained_another_adapter_and_promoted_none(
    bench: Bench, result: PipelineResult, second: PipelineResult
) -> None:
    assert second.adapter.sha256 != result.adapter.sha256
    assert second.preferences == result.preferences
    assert bench.served() == result.adapter.sha256


@pytest.mark.long  # a second training
async def test_one_is_promoted_rolled_back_and_served_again_after_a_restart(
    bench: Bench, result: PipelineResult, second: PipelineResult
) -> None:
    ids = _prompt_ids(bench, result)
    first, other = (_log_probs(bench.folder / "base", Path(made.adapter.uri), ids) for made in (result, second))
    assert first != pytest.approx(other, abs=1e-3), "the two adapters are alike, so this test would see no mix-up"
    common = {"workspace": str(bench.workspace), "promotion": bench.promotion()}
    folders = {"adapter": str(Path(second.adapter.uri).parent), "evaluation": str(Path(second.evaluation.uri).parent)}
    await run_to_the_end("promote-adapter/local", **folders, **common)
    assert bench.served() == second.adapter.sha256
    assert _served_log_probs(bench, "better", ids) == pytest.approx(other, abs=1e-3)
    await run_to_the_end("rollback-adapter/local", **common)
    assert bench.served() == result.adapter.sha256
    assert _served_log_probs(bench, "better", ids) == pytest.approx(first, abs=1e-3)
    _unload(bench, "better")
    assert "better" not in _served_models(bench), "as after a restart of vLLM"
    await run_to_the_end("reconcile-served/local", **common)
    assert bench.served() == result.adapter.sha256
    assert _served_log_probs(bench, "better", ids) == pytest.approx(first, abs=1e-3)


async def test_a_run_that_wants_labels_waits_for_them(bench: Bench, result: PipelineResult) -> None:
    promotion = PromotionConfig(name="agreed", min_win_rate=0.0, min_agreement=0.6, endpoint=None)
    config = bench.config().model_copy(update={"promotion": promotion})
    waiting = await dpo_pipeline(config)
    assert waiting.promotion is None
    assert "preflow label" in (waiting.declined or "")
    rows = [json.loads(line) for line in Path(result.evaluation.sibling("comparisons.jsonl")).read_text().splitlines()]
    Path(labels_uri(result.evaluation)).write_text(json.dumps({row["id"]: row["outcome"] for row in rows}))
    record_agreement(result.evaluation)
    agreed = await dpo_pipeline(config)
    assert agreed.promotion is not None
    assert agreed.declined is None


@pytest.mark.long  # another run
async def test_the_first_of_several_rounds_is_the_run(bench: Bench, result: PipelineResult) -> None:
    asked = bench.judge_requests()
    config = bench.config().model_dump(mode="json")
    await run_to_the_end("dpo-rounds/local", config=config, rounds={"rounds": 1})
    (kept,) = bench.workspace.glob("rounds/*/result.json")
    (only,) = RoundsResult.model_validate_json(kept.read_text()).rounds
    assert only.made.adapter == result.adapter
    assert bench.judge_requests() == asked


@pytest.mark.long  # another run
async def test_what_is_served_is_published(bench: Bench, result: PipelineResult) -> None:
    publishing = {"repo": "lab/better", "base_model": "lab/base"}
    await run_to_the_end("publish-adapter/local", workspace=str(bench.workspace), name="better", publishing=publishing)
    files = bench.hub.repos["lab/better"].files
    assert files["adapter_model.safetensors"] == Path(result.adapter.uri, "adapter_model.safetensors").read_bytes()
    assert f"{result.evaluation.win_rate:.3f}" in files["README.md"].decode()


def _prompt_ids(bench: Bench, result: PipelineResult) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bench.folder / "base")
    pair = json.loads(Path(result.preferences.uri).read_text().splitlines()[0])
    text = tokenizer.apply_chat_template([*pair["prompt"], *pair["chosen"]], tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _log_probs(base: Path, adapter: Path, ids: list[int]) -> list[float]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    found = torch.log_softmax(logits[:-1], dim=-1).gather(1, torch.tensor(ids[1:])[:, None])
    return [float(value) for value in found[:, 0]]


def _served_log_probs(bench: Bench, model: str, ids: list[int]) -> list[float]:
    body: dict[str, Any] = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    reply = httpx.post(f"{bench.vllm.base_url}/completions", json=body, timeout=60).raise_for_status().json()
    told = reply["choices"][0]["prompt_logprobs"][1:]
    return [entry[str(token)]["logprob"] for entry, token in zip(told, ids[1:], strict=True)]


def _unload(bench: Bench, name: str) -> None:
    url = f"{bench.vllm.base_url}/unload_lora_adapter"
    httpx.post(url, json={"lora_name": name}, timeout=60).raise_for_status()


def _served_models(bench: Bench) -> set[str]:
    return {entry["id"] for entry in httpx.get(f"{bench.vllm.base_url}/models").json()["data"]}


def _requests_served(bench: Bench) -> float:
    """Return how many requests vLLM itself says it has finished."""
    lines = httpx.get(bench.vllm.base_url.replace("/v1", "/metrics")).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:request_success_total"))


@pytest.mark.long  # two terminals
def test_it_can_be_talked_to_in_a_terminal(bench: Bench, result: PipelineResult) -> None:
    with Terminal("--endpoint", bench.vllm.base_url) as terminal:
        terminal.expect("better at ", "Please enter a message", "> ")
        terminal.send(b"Write a scene.\r")
        terminal.expect("> ")
        terminal.send(b"\x04")
        terminal.exit_code()


@pytest.mark.long  # two terminals
def test_talking_to_what_is_not_there_says_what_to_do(bench: Bench) -> None:
    with Terminal("--endpoint", f"http://127.0.0.1:{free_port()}/v1") as terminal:
        terminal.expect("is not usable", "preflow up")
        assert terminal.exit_code() == 2
    with Terminal("--endpoint", bench.vllm.base_url, "--model", "nobody") as terminal:
        terminal.expect("does not serve nobody", "base, ")
        assert terminal.exit_code() == 2


class Terminal:
    """`preflow chat` on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._seen = ""

    def __enter__(self) -> "Terminal":
        self._screen, inside = pty.openpty()
        command = [sys.executable, "-m", "preflow", "chat", *self._arguments]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=inside, stdout=inside, stderr=inside, start_new_session=True
        )
        os.close(inside)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._screen)

    def send(self, keys: bytes) -> None:
        os.write(self._screen, keys)

    def expect(self, *texts: str) -> None:
        """Wait until these texts have come, one after the other, and go on after the last."""
        for text in texts:
            while text not in self._seen:
                ready, _, _ = select.select([self._screen], [], [], 120)
                assert ready, f"{text!r} did not come; there is {self._seen!r}"
                try:
                    more = os.read(self._screen, 4096).decode(errors="replace")
                except OSError:  # the other end is closed
                    more = ""
                assert more, f"{text!r} did not come; there is {self._seen!r}"
                self._seen += re.sub(r"\x1b\[[\d;?]*[a-zA-Z]|[\x01\x02]", "", more)
            self._seen = self._seen.partition(text)[2]

    def exit_code(self) -> int:
        return self._process.wait(60)
