"""The demo's last lines: each win rate with the confidence of its own interval."""

from pathlib import Path

from tasks.demo.summary import summarise
from tasks.store.measures import Evaluation, WinRate
from tasks.store.workspace import AdapterRef, EvaluationRef, Manifest, PipelineResult, PreferencesRef, Workspace

FACTS = {"sha256": "a" * 64, "size": 1, "rows": 1}


def test_each_interval_is_printed_with_its_own_confidence(tmp_path: Path) -> None:
    store = Workspace(str(tmp_path))
    null = WinRate(win_rate=0.506, lower=0.461, upper=0.551, confidence=0.99)
    found = Evaluation(
        win_rate=0.83, lower=0.802, upper=0.854, samples=800, prompts=200, adapter_sha256="a" * 64, null=null
    )
    store.write_json(store.uri("win_rate.json"), found.model_dump(mode="json"))
    places = {name: {"uri": store.uri(name), "manifest": store.uri(f"{name}.json"), **FACTS} for name in "pa"}
    preferences, adapter = PreferencesRef(**places["p"]), AdapterRef(**places["a"])
    for artifact in (preferences, adapter):
        store.write_manifest(Manifest(artifact=artifact, stage=artifact.kind, version=1, key="k", files={}))
    evaluation = EvaluationRef(
        uri=store.uri("win_rate.json"), adapter_sha256="a" * 64, win_rate=0.83, lower=0.802, upper=0.854, **FACTS
    )
    result = PipelineResult(preferences=preferences, adapter=adapter, evaluation=evaluation)
    assert summarise(result, store.root, short=True) == [
        ("win rate", "83.0 % (80.2-85.4 %) at 95 %, 800 samples of 200 held-out prompts"),
        ("SFT against itself", "50.6 % (46.1-55.1 %) at 99 %"),
        ("adapter served", "none: it did not win by enough"),
    ]
