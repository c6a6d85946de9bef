"""Publishing on a hub that is called by the hub's own client over HTTP; its faults, and the card that arrives there."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.publish import publish_adapter
from tasks.config import EvaluationConfig, JudgingConfig, PromotionConfig, PublishingConfig
from tasks.errors import PreflowError
from tasks.evaluate.evidence import collect_evidence
from tasks.promote.pointer import install_adapter, move_pointer
from tasks.store.workspace import AdapterRef, EvaluationRef, Manifest, Origin, PreferencesRef, Workspace
from tests.fakes.evaluated import evaluated
from tests.fakes.hub import FakeHub

TOKEN = "hf_" + "t0ken" * 6
PUBLISHING = PublishingConfig(repo="lab/better", base_model="lab/base-3b", license="apache-2.0")
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
RATE = {"win_rate": 0.7, "lower": 0.65, "upper": 0.75, "samples": 800, "prompts": 200, "confidence": 0.975}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub(TOKEN) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # Large files go by git-lfs then; what hf_xet speaks with its own servers is not faked here.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        yield hub


@pytest.fixture
def workspace(tmp_path: Path) -> str:
    """A workspace with one promoted adapter and the manifests of what made it."""
    root = tmp_path / "workspace"
    promote(root, b"weights")
    return str(root)


def promote(root: Path, weights: bytes, are_judged: bool = True, judge: str | None = None) -> AdapterRef:
    store = Workspace(root)
    made = root.parent / "made"
    made.mkdir(exist_ok=True)
    (made / "adapter_model.safetensors").write_bytes(weights)
    (made / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/someone/base", "r": 16}))
    (made / "chat_template.jinja").write_text(TEMPLATE)
    uri = store.uri("training/k/adapter")
    sha256 = store.commit_folder(made, uri)
    store.write_json(store.uri("training/k/probe.json"), {"texts": ["rows of the data"]})
    adapter = AdapterRef(uri=uri, sha256=sha256, size=7, rows=189, manifest=store.uri("training/k/manifest.json"))
    common: Any = {"version": 1, "key": "k", "files": {}}
    pairs = PreferencesRef(uri=store.uri("preferences/k/train.jsonl"), sha256="a" * 64, size=1, rows=189,
                           manifest=store.uri("preferences/k/manifest.json"))  # fmt: skip
    judging = {"model": "judge-1", "panel": [{"model": "judge-2"}], "orders": 2,
               "rubric": "/home/someone/rubrics/house.md", "pair_policy": "unanimous"}  # fmt: skip
    config = EvaluationConfig(judging=JudgingConfig.model_validate({"model": judge} if judge else judging))
    judging = judging if are_judged else {}
    counts = {"pair": 214, "dropped": 26, "train": 189, "val": 25}
    store.write_manifest(Manifest(artifact=pairs, stage="preferences", config=judging, counts=counts, **common))
    models = [Origin(kind="sft_adapter", uri="sft", sha256="b" * 64)]
    models += [Origin(kind="base_model", uri="base", sha256="c" * 64)]
    training = {"base_model": "/home/someone/base", "beta": 0.1, "learning_rate": 5e-6, "loss_type": "sigmoid",
                "max_length": 2048, "seed": 42, "base_revision": "v1.2"}  # fmt: skip
    counts = {"steps": 60, "lora_rank": 96, "train_used": 189, "train_mean": 128, "val_used": 25, "val_mean": 130}
    figures = {"first_loss": 0.693147, "eval_loss": 0.4, "eval_rewards/accuracies": 0.92, "eval_rewards/margins": 0.81}
    store.write_manifest(
        Manifest(artifact=adapter, stage="training", config=training, upstream=(pairs, *models), counts=counts,
                 figures=figures, packages={"trl": "1.16.0", "peft": "0.21.2"}, **common)
    )  # fmt: skip
    rate = {**RATE, "null": {**RATE, "win_rate": 0.506, "lower": 0.471, "upper": 0.54}}
    store.write_json(store.uri("evaluations/k/win_rate.json"), rate)
    won = EvaluationRef(uri=store.uri("evaluations/k/win_rate.json"), sha256="0" * 64, size=1, rows=800,
                        adapter_sha256=sha256, win_rate=0.7, lower=0.65, upper=0.75,
                        manifest=store.uri("evaluations/k/manifest.json"))  # fmt: skip
    store.write_manifest(Manifest(artifact=won, stage="evaluation", upstream=(adapter,), config=config, **common))
    move_pointer(adapter, won, install_adapter(adapter, str(root), "mine"), str(root), PromotionConfig(name="mine"))
    return adapter


async def published(workspace: str, **changes: Any) -> Any:
    return await publish_adapter.fn(workspace, "mine", PUBLISHING.model_copy(update=changes))


async def test_the_adapter_arrives_with_its_card_and_nothing_else(workspace: str, hub: FakeHub) -> None:
    done = await published(workspace)
    repo = hub.repos["lab/better"]
    assert (repo.private, done.commit, done.url) == (True, repo.commits[-1], f"{hub.url}/lab/better")
    files = {name: content.decode() for name, content in repo.files.items()}
    card = files.pop("README.md")
    assert json.loads(files.pop("adapter_config.json")) == {"base_model_name_or_path": "lab/base-3b", "r": 16}
    assert files == {"adapter_model.safetensors": "weights", "chat_template.jinja": TEMPLATE}
    front = yaml.safe_load(card.split("---\n")[1])
    assert [front[name] for name in ("base_model", "library_name", "license")] == ["lab/base-3b", "peft", "apache-2.0"]
    assert {"dpo", "trl", "lora"} <= set(front["tags"])
    for fact in (
        "The interval holds at 97.5 %.", "70.0 % (65.0-75.0 %)", "50.6 % (47.1-54.0 %)", "judge-1, judge-2", "house.md",
        "The same judge compared 800 samples", "Completions, as chosen", "## Judge\n\n| what",
        "| preference pairs, training | 189 |", "| beta | 0.1 |", "| learning_rate | 5e-06 |",
        "| first loss | 0.6931 |", "b" * 64, done.adapter_sha256, "trl 1.16.0",
        'AutoModelForCausalLM.from_pretrained("lab/base-3b", revision="v1.2"), "lab/better")',
        "hf download lab/better chat_template.jinja --local-dir .\n"
        "vllm serve lab/base-3b --revision v1.2 --chat-template chat_template.jinja \\\n"
        "    --enable-lora --max-lora-rank 128 --lora-modules better=lab/better",
    ):  # fmt: skip
        assert fact in card, fact
    assert "/home/someone" not in card
    assert TOKEN not in card


@pytest.mark.parametrize("are_judged", [True, False])
async def test_the_card_credits_each_judge_with_what_it_did_and_none_with_pairs_that_were_given(
    tmp_path: Path, hub: FakeHub, are_judged: bool
) -> None:
    promote(tmp_path / "workspace", b"weights", are_judged, judge="judge-3")
    await published(str(tmp_path / "workspace"))
    card = hub.repos["lab/better"].files["README.md"].decode()
    assert "judge-3 compared 800 samples" in card
    assert ("pairs that were made elsewhere, and given. The data" in card) != are_judged
    assert ("## Judge" in card) == are_judged


@pytest.mark.parametrize("uploads", [True, False])
async def test_the_card_names_the_evidence_of_its_win_rate(tmp_path: Path, hub: FakeHub, uploads: bool) -> None:
    root = tmp_path / "workspace"
    adapter = promote(root, b"weights")
    won, promotion = evaluated(root, lambda identity: [1, 1], adapter=adapter), PromotionConfig(name="mine2")
    move_pointer(adapter, won, install_adapter(adapter, str(root), "mine2"), str(root), promotion)
    await publish_adapter.fn(str(root), "mine2", PUBLISHING.model_copy(update={"evidence": uploads}))
    files = hub.repos["lab/better"].files
    card, evidence = files["README.md"].decode(), collect_evidence(won, promotion).text()
    assert f"Its sha256 is `{hashlib.sha256(evidence).hexdigest()}`" in card
    assert ("[`evidence.json`](evidence.json)" in card) == uploads
    assert files.get("evidence.json") == (evidence if uploads else None)


async def test_evidence_that_is_gone_is_not_named_and_cannot_be_uploaded(
    workspace: str, hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    await published(workspace)
    assert "the model card names no evidence" in caplog.text
    assert "evidence" not in hub.repos["lab/better"].files["README.md"].decode()
    with pytest.raises(PreflowError, match="which samples were compared"):
        await published(workspace, evidence=True)


async def test_the_same_adapter_again_is_no_commit_and_a_new_one_is(workspace: str, hub: FakeHub) -> None:
    first = await published(workspace)
    asked = len(hub.asked)
    again = await published(workspace)
    assert again == first
    assert not any(method == "PUT" or "/commit/" in path for method, path in hub.asked[asked:])
    promote(Path(workspace), b"better weights")
    third = await published(workspace)
    assert third.commit != first.commit
    assert hub.repos["lab/better"].files["adapter_model.safetensors"] == b"better weights"


async def test_a_hub_that_is_busy_is_waited_for_and_one_that_stays_away_leaves_nothing_half_done(
    workspace: str, hub: FakeHub
) -> None:
    hub.faults = {"/preupload/": [503, 503], "/blob/": [503, 503], "/commit/": [503] * 50}
    with pytest.raises(PreflowError, match=r"answered 503.*run again later"):
        await published(workspace)
    assert hub.repos["lab/better"].files == {}
    sent, hub.faults = sum(method == "PUT" for method, _ in hub.asked), {}
    await published(workspace)
    assert len(hub.repos["lab/better"].files) == 4
    assert sum(method == "PUT" for method, _ in hub.asked) == sent, "what had arrived was sent again"


async def test_a_commit_whose_answer_is_lost_is_not_called_undone(workspace: str, hub: FakeHub) -> None:
    hub.lost = 50
    with pytest.raises(PreflowError, match="all of it is there, or nothing"):
        await published(workspace)
    commits, hub.lost = list(hub.repos["lab/better"].commits), 0
    assert (await published(workspace)).commit == commits[-1]
    assert hub.repos["lab/better"].commits == commits


async def test_what_the_hub_refuses_is_said(workspace: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PreflowError, match=r"answered 403.*\(nothing was uploaded\).*may not write to other/better"):
        await published(workspace, repo="other/better")
    hub.faults = {"/blob/": [400] * 50}  # a large file does not get through
    with pytest.raises(PreflowError, match="does not take it"):
        await published(workspace)
    assert hub.repos["lab/better"].files == {}
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PreflowError, match=r"http://127\.0\.0\.1:9 does not take it"):
        await published(workspace)


async def test_a_refused_token_is_named_and_not_shown(
    workspace: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = "hf_" + "wr0ng" * 6
    monkeypatch.setenv("HF_TOKEN", wrong)
    with pytest.raises(PreflowError, match=r"answered 401.*env:HF_TOKEN") as caught:
        await published(workspace)
    shown = str(caught.value) + repr(caught.value.__cause__) + caplog.text
    assert wrong not in shown
    assert hub.repos == {}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PreflowError, match=r"publishing\.token names env:HF_TOKEN, but it is not set"):
        await published(workspace)


async def test_what_cannot_be_published_is_refused_before_the_hub_is_asked(workspace: str, hub: FakeHub) -> None:
    with pytest.raises(PreflowError, match=r"publishing\.repo is empty"):
        await published(workspace, repo="")
    with pytest.raises(PreflowError, match=r"set publishing\.base_model to owner/name"):
        await published(workspace, base_model=None)
    with pytest.raises(PreflowError, match="only an adapter that passed its gate"):
        await publish_adapter.fn(workspace, "another", PUBLISHING)
    Path(workspace, "preferences", "k", "manifest.json").unlink()
    with pytest.raises(PreflowError, match="Publish from the workspace"):
        await published(workspace)
    assert hub.asked == []
