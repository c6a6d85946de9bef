"""Naming an artifact by hand: a folder, a manifest or JSON becomes a reference, and the wrong one is refused."""

from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.exceptions import ParameterTypeError
from prefect.utilities.callables import parameter_schema
from pydantic import TypeAdapter, ValidationError

from tasks.run.inputs import AdapterInput, PreferencesInput
from tasks.store.workspace import AdapterRef, Manifest, PreferencesRef, Workspace

PAIRS = TypeAdapter(PreferencesInput)


@pytest.fixture
def pairs(tmp_path: Path) -> PreferencesRef:
    """Finished pairs as the judging stage leaves them."""
    store = Workspace(tmp_path)
    folder = store.uri("preferences", "key")
    ref = PreferencesRef(
        uri=f"{folder}/train.jsonl", sha256="a" * 64, size=1, rows=1, val_rows=2, manifest=f"{folder}/manifest.json"
    )
    store.write_manifest(Manifest(artifact=ref, stage="preferences", version=1, key="key", files={}))
    return ref


def test_every_way_to_name_pairs_gives_the_same_reference(
    pairs: PreferencesRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "preferences" / "key"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    texts = ["~/preferences/key", " preferences/key\n", f"file://{folder}/", pairs.model_dump_json()]
    paths = map(str, (folder, folder / "manifest.json", folder / "train.jsonl"))
    for value in [pairs, pairs.model_dump(), *texts, *paths]:
        assert PAIRS.validate_python(value) == pairs, value


def test_an_adapter_is_named_by_its_folder_or_its_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its manifest is written last: a training without one has no finished adapter."""
    store = Workspace(tmp_path)
    folder, local = store.uri("training", "key"), tmp_path / "made"
    adapter = TypeAdapter(AdapterInput)
    local.mkdir()
    (local / "adapter_model.safetensors").write_bytes(b"weights")
    sha256 = store.commit_folder(local, f"{folder}/adapter")
    with pytest.raises(ValidationError, match="give the folder of finished adapter"):
        adapter.validate_python(folder)
    ref = AdapterRef(uri=f"{folder}/adapter", sha256=sha256, size=7, rows=5, manifest=f"{folder}/manifest.json")
    store.write_manifest(Manifest(artifact=ref, stage="training", version=1, key="key", files={}))
    monkeypatch.chdir(tmp_path)
    for text in (folder, f"{folder}/adapter", f"{folder}/manifest.json", "training/key"):
        assert adapter.validate_python(text) == ref, text
    with pytest.raises(ValidationError, match="is the manifest of adapter, and preferences is wanted here"):
        PAIRS.validate_python(folder)  # another stage's


@pytest.mark.parametrize(
    ("text", "message"),
    [("nowhere", r"there is no .*/nowhere/manifest\.json: give the folder of finished preferences"),
     ("a text, not a path " * 999, "there is no .*give the folder"), ("/proc/self/mem/\0", "null byte"),
     ("{broken", "property name"), ('{"kind": "adapter"}', "preferences")],
)  # fmt: skip
def test_what_names_no_pairs_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PAIRS.validate_python(text)


def test_a_place_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Workspace, uri: str) -> bool:
        raise PermissionError(13, "not allowed, or no valid credentials (none)", uri)

    monkeypatch.setattr(Workspace, "exists", refuse)
    with pytest.raises(ValidationError, match=r"/w/preferences/k: cannot be read \(not allowed, or no valid credent"):
        PAIRS.validate_python("/w/preferences/k")


def test_a_flow_says_which_parameter_names_nothing_sees_a_reference_and_takes_text_first(pairs: PreferencesRef) -> None:
    @flow
    def stage(preferences: PreferencesInput) -> PreferencesRef:
        return preferences

    given = {"preferences": str(Path(pairs.uri).parent)}
    assert stage.validate_parameters(given) == {"preferences": pairs}
    with pytest.raises(ParameterTypeError, match=r"preferences.*there is no .*/nowhere/manifest\.json"):
        stage.validate_parameters({"preferences": "nowhere"})
    spec: dict[str, Any] = parameter_schema(stage.fn).model_dump()["properties"]["preferences"]
    assert spec["anyOf"] == [{"type": "string"}, {"$ref": "#/definitions/PreferencesRef"}]
