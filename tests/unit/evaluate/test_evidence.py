"""Evidence of a verdict: whole, the same each time, and whatever is changed in it is noticed and named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preflow.cli import Exit, main
from tasks.config import PipelineConfig, PromotionConfig
from tasks.errors import PreflowError
from tasks.evaluate.evidence import Made, collect_evidence, find_differences, read_evidence
from tasks.evaluate.labels import Labelling, record_agreement
from tasks.store.measures import Choice, Tried
from tasks.store.workspace import (
    AdapterRef,
    CompletionsRef,
    EvaluationRef,
    Manifest,
    PipelineResult,
    PreferencesRef,
    Workspace,
    digest,
)
from tests.fakes.evaluated import evaluated

PROMOTION = PromotionConfig(min_win_rate=0.55)


def mostly_new(identity: str) -> list[int | None]:
    """Be undecided by the order now and then, unreadable once, and for the new adapter in most others."""
    prompt, _, sample = identity[1:].partition("#")
    number = 2 * int(prompt) + int(sample)
    return [None, 1] if number == 31 else [0, 1] if number % 7 == 0 else [int(number % 5 > 0)] * 2


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> EvaluationRef:
    made = evaluated(tmp_path_factory.mktemp("workspace"), mostly_new, judges=("other",))
    labelling = Labelling(made, 20)
    for number in range(labelling.total):
        labelling.answer(number, "012"[number % 3])
    record_agreement(made)
    return made


@pytest.fixture
def file(evaluation: EvaluationRef, tmp_path: Path) -> Path:
    path = tmp_path / "evidence.json"
    path.write_bytes(collect_evidence(evaluation, PROMOTION).text())
    return path


def differences(path: Path, change: Callable[[Any], object]) -> list[str]:
    """Return what a verification finds after a change of the file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return list(find_differences(read_evidence(path)))


def test_what_was_written_holds_and_is_the_same_each_time(file: Path, evaluation: EvaluationRef) -> None:
    assert collect_evidence(evaluation, PROMOTION).text() == file.read_bytes()
    assert differences(file, lambda value: None) == []
    found = read_evidence(file)
    assert (len(found.comparisons), len(found.labels), found.verdict.unreadable) == (60, 20, 1)
    assert found.verdict.second is not None
    assert found.verdict.agreement is not None


def test_it_tells_no_folder_no_address_and_no_secret(file: Path, evaluation: EvaluationRef) -> None:
    text = file.read_text()
    for private in ("secret-folder", Workspace.holding(evaluation.uri).root, "http://", "api_key", "/tmp"):
        assert private not in text, private
    assert '"rubric": "house.md"' in text


@pytest.mark.parametrize(("config", "told"), [({}, {}), ({"seed": 3}, {"seed": 3})])
def test_of_completions_that_were_given_no_settings_are_told(config: Any, told: Any) -> None:
    given = CompletionsRef(uri="c", sha256="a" * 64, size=1, rows=1)
    manifest = Manifest(artifact=given, stage="generation", version=1, key="k", files={}, config=config)
    assert {name: value for name, value in Made.of(manifest).settings.items() if name == "seed"} == told


def vote(value: Any, rows: str = "comparisons", row: int = 3, order: int = 0) -> Any:
    return value[rows][row]["row"]["votes"][order]


def sides(value: Any) -> None:
    """Exchange both votes on a tie: no figure changes."""
    for cast in (vote(value, row=0, order=order) for order in (0, 1)):
        cast["best"], cast["worst"] = cast["worst"], cast["best"]


def forge(value: Any) -> None:
    vote(value)["best"] = 0
    value["comparisons"][3]["sha256"] = digest(value["comparisons"][3]["row"])[:16]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda v: vote(v).update(best=0), "p1#1 was changed after the judges left it: its votes are labeller 0"),
        (lambda v: vote(v).update(best=0), "verdict.win_rate: "),
        (sides, "comparisons: p0#0 was changed"),
        (lambda v: vote(v).update(confidence=5), "comparisons: p1#1 was changed"),
        (lambda v: vote(v, "null").update(best=1 - vote(v, "null")["best"]), "verdict.null.win_rate"),
        (lambda v: vote(v, order=2).update(best=0), "verdict.second.rate.win_rate"),
        (forge, "the verdicts that were evaluated are"),
        (lambda v: v["comparisons"].pop(), "the verdicts that were evaluated are"),
        (lambda v: v["comparisons"][4]["row"]["completions"].reverse(), "comparisons: p2#0 was changed"),
        (lambda v: v.update(null=None), "verdict.null: None by the comparisons"),
        (lambda v: v["verdict"].update(lower=0.7), "verdict.lower: 0.6"),
        (lambda v: v["verdict"].update(adapter_sha256="c" * 64), "verdict.adapter_sha256: aaa"),
        (lambda v: v["verdict"].update(detectable=0.51), "verdict.detectable"),
        (lambda v: v.update(min_win_rate=0.9), "passes: False by the comparisons, True in the file"),
        (lambda v: v.update(passes=False), "passes: True by the comparisons, False in the file"),
        (lambda v: v.update(rubric="Always choose the second one."), "rubric: not the one that the judge was told"),
        (lambda v: v["labels"].update({"p1#1": 0.5, "p2#1": 0.5, "p3#1": 0.5}), "verdict.agreement."),
        (lambda v: v["made"][-1]["settings"].update(confidence=0.8), "verdict.confidence: 0.8"),
        (lambda v: v["made"][0]["packages"].update(torch="9.9"), "seal: something was changed"),
        (lambda v: v["labels"].clear(), "verdict.agreement: None by the comparisons"),
        (lambda v: v["made"].pop(), "made: does not end with the evaluation"),
    ],
)  # fmt: skip
def test_whatever_is_changed_is_noticed_and_named(file: Path, change: Callable[[Any], object], named: str) -> None:
    found = differences(file, change)
    assert any(named in difference for difference in found), found


def test_how_the_checkpoint_was_chosen_is_in_it_and_is_checked(file: Path) -> None:
    """Without a choice the file has no such field, so that the seals of older ones hold."""
    assert "choice" not in json.loads(file.read_text())
    value = read_evidence(file)
    tried = [Tried(**value.verdict.model_dump() | {"adapter_sha256": of * 64, "step": int(of, 16)}) for of in "1a"]
    good = Choice(tried=tuple(tried), prompts=("other",))

    def verify(choice: Choice) -> list[str]:
        changed = value.model_copy(update={"choice": choice})
        return list(find_differences(changed.model_copy(update={"seal": changed.contents()})))

    assert verify(good) == []
    assert verify(good.model_copy(update={"prompts": ("p1", "p2", "other")})) == [
        "choice: 2 prompts of the comparisons chose the checkpoint too"
    ]
    assert "another adapter was evaluated" in verify(good.model_copy(update={"tried": tuple(tried[::-1])}))[0]


def test_what_is_no_evidence_no_comparison_and_no_setting_is_named(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for text, said in (("", "not evidence"), ("[]", "not evidence"), ('{"format": 1}', "format")):
        file.write_text(text)
        with pytest.raises(PreflowError, match=said):
            read_evidence(file)
    with pytest.raises(PreflowError, match="preflow evidence"):
        read_evidence(tmp_path / "none.json")
    for change, said in (
        (lambda v: vote(v).pop("best"), r"comparisons\.3\.row"),
        (lambda v: v["made"][-1]["settings"].update(confidence=8), "settings of the evaluation"),
    ):
        file.write_bytes(whole)
        with pytest.raises(PreflowError, match=said):
            differences(file, change)


def test_verify_says_so_in_the_exit_code(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(file)]) == Exit.DONE
    assert "holds: adapter aaaaaaaaaaaa wins" in capsys.readouterr().out
    file.write_text(file.read_text().replace('"best": 1', '"best": 0', 1))
    assert main(["verify", str(file)]) == Exit.WRONG
    assert "was changed after the judges left it" in capsys.readouterr().out


def test_a_run_is_named_by_its_folder(
    evaluation: EvaluationRef, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one that was started from the UI, which has no config.yaml."""
    root = Workspace.holding(evaluation.uri).uri("..")
    facts: Any = {"uri": "gone", "sha256": "a" * 64, "size": 1, "rows": 1}
    result = PipelineResult(preferences=PreferencesRef(**facts), adapter=AdapterRef(**facts), evaluation=evaluation)
    config = PipelineConfig(prompts="x.jsonl", workspace=root, promotion=PROMOTION)
    store, folder, to = Workspace(tmp_path), str(tmp_path / "runs" / "k"), tmp_path / "written.json"
    for name, content in (("config", config), ("result", result)):
        store.write_json(f"{folder}/{name}.json", content.model_dump(mode="json"))
    assert main(["evidence", folder, "--to", str(to)]) == Exit.DONE
    assert to.read_bytes() == file.read_bytes()
    assert main(["evidence", str(tmp_path)]) == Exit.WRONG
    (Path(folder) / "config.json").unlink()
    assert main(["evidence", folder]) == Exit.WRONG
    said = capsys.readouterr().err
    assert "holds no finished run; name its folder" in said
    assert "config.json: not there, or of another version: name the run's config.yaml" in said


def test_uncounted_answers_count_and_what_is_no_longer_there_is_named(tmp_path: Path) -> None:
    made = evaluated(tmp_path, mostly_new, prompts=4)
    Labelling(made, 4).answer(0, "1")
    (tmp_path / "e.json").write_bytes(collect_evidence(made, PROMOTION).text())
    assert differences(tmp_path / "e.json", lambda value: None) == []
    assert read_evidence(tmp_path / "e.json").verdict.agreement is not None
    for gone in ("verdicts/main/rubric.md", made.sibling("comparisons.jsonl")):
        (tmp_path / gone).unlink()
        with pytest.raises(PreflowError, match=rf"{Path(gone).name}.*run the pipeline again"):
            collect_evidence(made, PROMOTION)
