"""The whole of preflow with real parts, as deployments on a process pool: every one of them runs here.

A Prefect server, a process worker, vLLM on CPU, the trainer, the demo's judge over HTTP, and a browser on the Prefect
UI; only the hub is a fake. The tests stand in the order in which a user would come to them: start, watch, approve,
read, serve, and go on after a crash. Pictures of every page are kept in tests/output (or PREFLOW_TEST_PICTURES).
"""

import json
import os
import pty
import re
import secrets
import select
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
from playwright.sync_api import expect
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

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
from tasks.demo.up import Up
from tasks.evaluate.labels import labels_uri, record_agreement
from tasks.promote.pointer import PromotionRefused, read_pointer
from tasks.rounds.rounds import RoundsResult
from tasks.store.workspace import PipelineResult, Workspace
from tasks.sweep.ranking import SweepResult
from tests.browser import PrefectUi, faults, open_browser
from tests.deployed import Api, process_worker, run_to_the_end, until
from tests.fakes.hub import FakeHub
from tests.fakes.process import ROOT, FakeOpenAI
from tests.models import demo_adapter, demo_base

VLLM_PYTHON = ROOT / ".venv-serve" / "bin" / "python"

pytestmark = pytest.mark.timeout(1200)


SAMPLING, TRAINING = "generate-completions/local", "train-dpo/local"
TOKEN = "hf_" + "t0ken" * 6


@dataclass
class Bench:
    """A machine with everything on it: model, adapter, prompts, servers, deployments, a worker, and a workspace."""

    folder: Path
    vllm: Service
    judge_url: str
    hub: FakeHub
    api: Api
    url: str

    @property
    def workspace(self) -> Path:
        return self.folder / "workspace"

    def config(self, asking: bool = False) -> PipelineConfig:
        """Return a whole run; `asking`: that waits for a yes before it judges and before it promotes."""
        return PipelineConfig(
            approve_before=("judging", "promotion") if asking else (),
            prompts=str(self.folder / "prompts.jsonl"),
            eval_prompts=str(self.folder / "held-out.jsonl"),
            workspace=str(self.workspace),
            generation=GenerationConfig(
                endpoint=self.vllm.base_url, model="sft", num_completions=3, max_tokens=48, frequency_penalty=0.0
            ),
            judging=JudgingConfig(
                endpoint=self.judge_url,
                model="demo-judge",
                api_key="env:DEMO_JUDGE_KEY",
                rubric="demo",
                prompt_price=0.3,
                completion_price=2.5,
            ),
            training=TrainingConfig(
                base_model=str(self.folder / "base"),
                sft_adapter=str(self.folder / "sft"),
                load_in_4bit=False,
                bf16=False,
                learning_rate=1e-3,
                max_steps=4,
                warmup_steps=1,
                max_length=256,
                logging_steps=1,
                eval_steps=2,
                gradient_accumulation_steps=2,
            ),
            training_deployment=TRAINING,
            evaluation=EvaluationConfig(num_samples=2, null_test=False),
            # Four steps of a hardly trained model need not win: what is tested here is the way, not the win.
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

    def judged(self, completions: int | None = None) -> int:
        """How many requests the judge has answered; those that show so many completions."""
        rows = [json.loads(line) for line in (self.folder / "judge-requests.jsonl").read_text().splitlines()]
        return sum(completions in (None, row.get("completions")) for row in rows)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bench")
    demo_base(folder / "base")
    demo_adapter(folder / "sft", seed=7)
    write_prompts(folder / "prompts.jsonl", training_prompts(24, 7))
    write_prompts(folder / "held-out.jsonl", heldout_prompts(10, 7))
    key = secrets.token_hex(8)
    vllm = vllm_server(VLLM_PYTHON, folder / "base", folder / "vllm.log", {"sft": folder / "sft"})
    with ExitStack() as stack:
        stack.callback(vllm.stop)
        vllm.start()  # and becomes ready while the deployments are registered
        server = request.getfixturevalue("registered_prefect_server")
        hub = stack.enter_context(FakeHub(TOKEN))
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        # Large files go by git-lfs then; what hf_xet speaks with its own servers is not faked.
        told = {"DEMO_JUDGE_KEY": key, "HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1",
                "PREFECT_LOGGING_TO_API_ENABLED": "true"}  # fmt: skip
        for name, value in told.items():
            environment.setenv(name, value)
        judge = stack.enter_context(judge_server(folder, key))
        stack.enter_context(process_worker(folder))
        vllm.wait_ready()
        yield Bench(folder, vllm, f"http://127.0.0.1:{judge.port}/v1", hub, Api(server), server.removesuffix("/api"))


@pytest.fixture
def ui(bench: Bench) -> Iterator[PrefectUi]:
    """A browser for one test: while it is open, no other event loop can run in this thread."""
    with open_browser() as page:
        yield PrefectUi(page, bench.url)


def write_prompts(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- the form


def form_titles(bench: Bench) -> dict[str, str]:
    """Return the title that the form gives each field of the sampling stage."""
    schema = bench.api.deployment(SAMPLING)["parameter_openapi_schema"]
    fields = {**schema["properties"], **schema["definitions"]["GenerationConfig"]["properties"]}
    return {name: field.get("title", name) for name, field in fields.items()}


def test_wrong_values_are_refused_in_the_form(bench: Bench, ui: PrefectUi) -> None:
    """A number out of bounds by the browser, a text of the wrong form by the server; both before there is a run."""
    titles = form_titles(bench)
    ui.open_form(bench.api.deployment(SAMPLING)["id"])
    temperature = ui.field(titles["temperature"])
    temperature.fill("5")
    ui.submit()
    assert "less than or equal to 2" in temperature.evaluate("field => field.validationMessage")
    temperature.fill("0.9")
    ui.field(titles["endpoint"]).fill("vllm:8000")
    ui.submit()
    expect(ui.page.get_by_text("'vllm:8000' does not match").first).to_be_visible()
    ui.picture("form-wrong-value")
    assert bench.api.runs(SAMPLING) == []


def test_a_key_typed_into_the_form_is_refused_and_stored_nowhere(bench: Bench, ui: PrefectUi) -> None:
    key, publishing = "sk-abcdefghijklmnopqrstuvwxyz123456", bench.api.deployment("publish-adapter/local")
    ui.open_form(publishing["id"])
    fields = publishing["parameter_openapi_schema"]["definitions"]["PublishingConfig"]["properties"]
    ui.field(fields["token"]["title"]).fill(key)
    ui.submit()
    expect(ui.page.get_by_text("does not match").first).to_be_visible()
    assert bench.api.runs("publish-adapter/local") == []
    home = Path(os.environ["PREFECT_HOME"])
    files = [file for file in (*home.parent.rglob("*"), *bench.folder.rglob("*")) if file.is_file()]
    assert any(file.name == "prefect.db" for file in files)
    assert [str(file) for file in files if key.encode() in file.read_bytes()] == []


@pytest.mark.long  # a run of a stage, which the pipeline has too
def test_a_run_is_started_from_the_form_and_unchanged_fields_keep_their_defaults(bench: Bench, ui: PrefectUi) -> None:
    titles = form_titles(bench)
    ui.open_form(bench.api.deployment(SAMPLING)["id"])
    ui.field(titles["prompts"]).fill(write_prompts(bench.folder / "form.jsonl", training_prompts(6, 8)))
    ui.field(titles["workspace"]).fill(str(bench.folder / "form-workspace"))
    with FakeOpenAI({}, bench.folder / "form-endpoint") as endpoint:
        ui.field(titles["endpoint"]).fill(endpoint.url)
        last = ui.field(titles["num_completions"])
        last.fill("4")
        ui.field("Run Name").fill("my first run")
        ui.picture("form-filled")
        ui.press(ui.page.get_by_role("button", name="Submit"), last)
        (run,) = until(lambda: bench.api.runs(SAMPLING))
        ui.open(f"/runs/flow-run/{run['id']}")
        ui.wait_for_state("Completed")
    ui.picture("run-of-a-stage")
    assert bench.api.get(f"/flow_runs/{run['id']}")["name"] == "my first run"
    given = run["parameters"]["generation"]
    assert (given["num_completions"], given["temperature"], given["max_tokens"]) == (4, 0.9, 256)
    (file,) = (bench.folder / "form-workspace" / "completions").glob("*/completions.jsonl")
    assert [len(json.loads(line)["completions"]) for line in file.read_text().splitlines()] == [4] * 6


# ---- a run that asks before it judges and before it promotes


@pytest.fixture(scope="module")
def waiting(bench: Bench) -> str:
    """A run of the whole pipeline that waits for a yes before its judge is paid."""
    run = bench.api.start("dpo-pipeline/local", {"config": bench.config(asking=True).model_dump(mode="json")})
    bench.api.wait(run, "PAUSED")
    return run


@pytest.mark.long  # a second run
def test_a_no_ends_the_run_as_cancelled_with_the_reason(bench: Bench, waiting: str, ui: PrefectUi) -> None:
    """While another run waits: it holds neither the worker nor the one place that the deployment has."""
    config = bench.config(asking=True).model_dump(mode="json")
    config["judging"] |= {"seed": 7, "orders": 3}
    run = bench.api.start("dpo-pipeline/local", {"config": config})
    bench.api.wait(run, "PAUSED")
    assert bench.api.get(f"/flow_runs/{waiting}")["state_type"] == "PAUSED"
    ui.answer(run, "72 questions", False, "too dear for now", "approval-refused")
    ended = bench.api.wait(run, "CANCELLED")
    assert "too dear for now" in ended["state"]["message"]
    assert bench.judged(3) == 0


@pytest.fixture(scope="module")
def result(bench: Bench, waiting: str) -> PipelineResult:
    """What the pipeline made, which left its training to another deployment, after a yes to each question."""
    assert bench.judged(3) == 0, "the judge was paid before anybody approved"
    with open_browser() as page:
        ui = PrefectUi(page, bench.url)
        ui.answer(waiting, "48 questions", True, "cheap enough", "approval-of-judging")
        until(lambda: bench.judged(3))
        bench.api.wait(waiting, "PAUSED")
        asked = bench.judged(3)
        ui.answer(waiting, "The new adapter wins", True, "reads well", "approval-of-promotion")
        ui.wait_for_state("Completed")
    bench.api.wait(waiting, "COMPLETED")
    assert bench.judged(3) == asked, "a resumed run asked the judge again"
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


def test_what_was_approved_is_kept(bench: Bench, result: PipelineResult) -> None:
    (answers,) = bench.workspace.glob("runs/*/approvals/promotion.json")
    assert [(a["approve"], a["note"]) for a in json.loads(answers.read_text())["answers"]] == [(True, "reads well")]


def test_its_pages_can_be_read(bench: Bench, waiting: str, result: PipelineResult, ui: PrefectUi) -> None:
    """Every page that a run has left, and its pictures are there."""
    pictures = {"report": 9, "preferences": 2, "training": 6, "training-live": 6}
    ui.open(f"/runs/flow-run/{waiting}?tab=Artifacts")
    ui.picture("run-of-the-pipeline")
    ui.page.get_by_text("report", exact=True).first.click()
    # Its history; each version is named by the first digits of its id.
    ui.page.get_by_role("link", name=re.compile("^[0-9a-f]{8}$")).first.click()
    expect(ui.page.get_by_role("heading", name="At a glance")).to_be_visible()
    latest = bench.api.post("/artifacts/latest/filter", {})
    pages = {item["key"]: item["latest_id"] for item in latest if item["type"] == "markdown"}
    assert set(pages) >= {"report", "preferences", "example-pairs", "training", "evaluation", "cost", "lineage"}
    for key, artifact in pages.items():
        ui.open(f"/artifacts/artifact/{artifact}")
        expect(ui.page.get_by_role("tabpanel").get_by_role("heading").first).to_be_visible()
        widths = until(lambda key=key: len(found := ui.pictures_shown()) >= pictures.get(key, 0) and (found or [1]))
        assert all(width > 0 for width in widths), f"{key}: a picture is broken: {widths}"
        ui.picture(f"artifact-{key}")


def test_the_report_opens_from_the_disk(bench: Bench, result: PipelineResult, ui: PrefectUi) -> None:
    (report,) = bench.workspace.glob("runs/*/report.html")
    ui.page.goto(report.as_uri())
    expect(ui.page.get_by_role("heading", name="At a glance")).to_be_visible()
    assert len(ui.pictures_shown()) == 9  # win rates, two of the judge, six of the training
    assert all(width > 0 for width in ui.pictures_shown())
    ui.picture("report")
    ui.page.set_viewport_size({"width": 390, "height": 844})
    assert faults(ui.page) == []
    ui.picture("report-phone", whole=False)


def test_its_verdict_is_recomputed_from_one_file(bench: Bench, result: PipelineResult, tmp_path: Path) -> None:
    (kept,) = bench.workspace.glob("runs/*/result.json")
    file = tmp_path / "evidence.json"
    assert main(["evidence", str(kept.parent), "--to", str(file)]) == Exit.DONE
    assert main(["verify", str(file)]) == Exit.DONE
    for private in (str(bench.folder), bench.judge_url, "DEMO_JUDGE_KEY"):
        assert private not in file.read_text()


def test_it_left_the_training_to_its_deployment(bench: Bench, result: PipelineResult) -> None:
    (run,) = bench.api.runs(TRAINING)
    assert (run["state_type"], run["run_count"]) == ("COMPLETED", 1)


@pytest.mark.long  # two runs of stages, which the pipeline has too
async def test_the_stages_run_alone_take_what_the_run_has_made(bench: Bench, result: PipelineResult) -> None:
    config, made, asked = (
        bench.config().filled(),
        bench.made("completions") | bench.made("preferences"),
        bench.judged(3),
    )
    await run_to_the_end(
        SAMPLING, prompts=config.prompts, workspace=config.workspace,
        generation=config.generation.model_dump(mode="json"),
    )  # fmt: skip
    await run_to_the_end(
        "judge-preferences/local", completions=str(Path(result.completions.uri).parent), workspace=config.workspace,
        judging=config.judging.model_dump(mode="json"),
    )  # fmt: skip
    assert bench.made("completions") | bench.made("preferences") == made
    assert bench.judged(3) == asked


def test_the_promoted_adapter_is_the_one_served(bench: Bench, result: PipelineResult) -> None:
    ids = _prompt_ids(bench, result)
    trained = _log_probs(bench.folder / "base", Path(result.adapter.uri), ids)
    sft = _log_probs(bench.folder / "base", bench.folder / "sft", ids)
    assert _served_log_probs(bench, "better", ids) == pytest.approx(trained, abs=1e-3)
    assert _served_log_probs(bench, "sft", ids) == pytest.approx(sft, abs=1e-3)
    assert trained != pytest.approx(sft, abs=1e-3), "the two adapters are alike, so this test would see no mix-up"


async def test_a_second_run_asks_nobody(bench: Bench, result: PipelineResult) -> None:
    asked, sampled = bench.judged(), _requests_served(bench)
    again = await dpo_pipeline(bench.config())
    assert again == result
    assert (bench.judged(), _requests_served(bench)) == (asked, sampled)


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
async def test_the_pairs_are_audited_by_the_deployment_for_that(bench: Bench, result: PipelineResult) -> None:
    pairs, completions = Path(result.preferences.uri).parent, Path(result.completions.uri).parent
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
    asked = bench.judged(3)
    config = bench.config().model_dump(mode="json")
    await run_to_the_end("dpo-rounds/local", config=config, rounds={"rounds": 1})
    (kept,) = bench.workspace.glob("rounds/*/result.json")
    (only,) = RoundsResult.model_validate_json(kept.read_text()).rounds
    assert only.made.adapter == result.adapter
    assert bench.judged(3) == asked


@pytest.mark.long  # another run
async def test_what_is_served_is_published(bench: Bench, result: PipelineResult) -> None:
    publishing = {"repo": "lab/better", "base_model": "lab/base"}
    await run_to_the_end("publish-adapter/local", workspace=str(bench.workspace), name="better", publishing=publishing)
    files = bench.hub.repos["lab/better"].files
    assert files["adapter_model.safetensors"] == Path(result.adapter.uri, "adapter_model.safetensors").read_bytes()
    assert f"{100 * result.evaluation.win_rate:.1f} %" in files["README.md"].decode()


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


# ---- what the browser starts again


@pytest.mark.long  # a run; another test runs the pipeline
def test_quick_run_starts_with_two_clicks(bench: Bench, ui: PrefectUi) -> None:
    """As `preflow up` serves it: nothing is typed, no form opens."""
    up = Up(bench.folder / "served")
    up.run.mkdir(parents=True)
    config = {**bench.config().model_dump(mode="json"), "workspace": str(bench.folder / "quick-workspace")}
    (up.run / "serving.json").write_text(json.dumps({"name": "quick", "config": config, "sweep": {}}))
    serving = subprocess.Popen([sys.executable, "-m", "preflow.serving", str(up.root)], cwd=ROOT)
    try:
        until(up.served.exists)
        name = "generate-completions/quick-generate"
        ui.open(f"/deployments/deployment/{bench.api.deployment(name)['id']}")
        ui.page.get_by_role("button", name="Run", exact=True).click()
        ui.page.get_by_role("menuitem", name="Quick run").click()
        (run,) = until(lambda: bench.api.runs(name))
        expect(ui.page.get_by_role("dialog")).to_have_count(0)
        ui.picture("quick-run")
        assert bench.api.wait(run["id"], "COMPLETED")["name"] == "sample sft"
    finally:
        serving.terminate()
        serving.wait(60)


@pytest.mark.long  # a run, killed
def test_a_crashed_run_goes_on_from_the_retry_button(bench: Bench, ui: PrefectUi) -> None:
    bench.api.switch("preflow-restart-crashed", on=False)  # here a person presses Retry
    prompts = write_prompts(bench.folder / "crash.jsonl", training_prompts(40, 9))
    workspace = bench.folder / "crash-workspace"
    with FakeOpenAI({"latency_ms": 400}, bench.folder / "slow") as slow:
        generation = {"endpoint": slow.url, "max_concurrency": 2, "num_completions": 2}
        run = bench.api.start(SAMPLING, {"prompts": prompts, "workspace": str(workspace), "generation": generation})
        until(lambda: len(kept_rows(workspace)) >= 5)
        for pid in until(lambda: processes_of(run)):
            os.kill(pid, signal.SIGKILL)
        bench.api.wait(run, "CRASHED")
        kept = kept_rows(workspace)
        assert 0 < len(kept) < 40
        ui.open(f"/runs/flow-run/{run}")
        ui.wait_for_state("Crashed")
        ui.picture("run-crashed")
        ui.choose("Retry")
        dialog = ui.page.get_by_role("alertdialog").or_(ui.page.get_by_role("dialog"))
        ui.press(dialog.get_by_role("button", name="Retry"), dialog)
        # The worker may report the first process's end once more: the page takes that for the last word.
        until(lambda: bench.api.get(f"/flow_runs/{run}")["state_type"] == "COMPLETED")
        ui.open(f"/runs/flow-run/{run}")
        ui.wait_for_state("Completed")
        ui.picture("run-retried")
        asked = Counter(request["prompt"] for request in slow.requests())
    assert len(asked) == 40
    # Only what was under way when the process died may be asked again: two requests, and one in the client's hands.
    assert sum(count > 1 for count in asked.values()) <= 3
    assert bench.api.get(f"/flow_runs/{run}")["run_count"] >= 2


def kept_rows(workspace: Path) -> list[str]:
    """Return the lines of the rows that are kept."""
    files = (workspace / "rows").rglob("*.jsonl")
    return [line for file in files for line in file.read_text().splitlines()]


def processes_of(run: str) -> list[int]:
    """Return the processes that execute a flow run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:  # it has ended, or is another user's
            continue
        if b"prefect.engine" in command and run.encode() in environment:
            found.append(int(folder.name))
    return found
