"""What a flow takes for an artifact of another stage: its reference, or text that names it, as a person pastes it."""

import functools
import json
import posixpath
from typing import Annotated

from pydantic import BeforeValidator

from tasks.config import resolve_location
from tasks.store.workspace import AdapterRef, CompletionsRef, EvaluationRef, PreferencesRef, Reference, Workspace


def find_reference(kind: type[Reference], value: object) -> object:
    """Return what a parameter that names an artifact means: text may be its folder, its manifest.json, or its JSON.

    Raises:
        ValueError: there is no such artifact there; pydantic's message then names the parameter.
    """
    if not isinstance(value, str):
        return value
    text, wanted = value.strip(), kind.model_fields["kind"].default
    if text.startswith("{"):
        return json.loads(text)
    uri = resolve_location(text)
    places = [f"{uri}/manifest.json", f"{posixpath.dirname(uri)}/manifest.json"]
    if uri.endswith("manifest.json"):
        places = [uri]
    store = Workspace.holding(uri)
    try:
        manifest = next((place for place in places if store.exists(place)), None)
    except OSError as error:
        raise ValueError(f"{uri}: cannot be read ({error.strerror or error})") from error
    if manifest is None:
        raise ValueError(
            f"there is no {places[0]}: give the folder of finished {wanted} (in the workspace) or its manifest.json"
        )
    artifact = store.read_manifest(manifest).artifact
    if artifact.kind != wanted:
        raise ValueError(f"{manifest} is the manifest of {artifact.kind}, and {wanted} is wanted here")
    return artifact


def _named(kind: type[Reference]) -> BeforeValidator:
    return BeforeValidator(functools.partial(find_reference, kind), json_schema_input_type=str | kind)


# The types of flow parameters: inside the flow each is a reference.
CompletionsInput = Annotated[CompletionsRef, _named(CompletionsRef)]
PreferencesInput = Annotated[PreferencesRef, _named(PreferencesRef)]
AdapterInput = Annotated[AdapterRef, _named(AdapterRef)]
EvaluationInput = Annotated[EvaluationRef, _named(EvaluationRef)]
