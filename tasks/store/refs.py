"""What stages hand each other: references to artifacts, and the manifests that say what each was made from."""

import hashlib
import json
import posixpath
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, JsonValue, SerializeAsAny

from tasks.config.base import field_title

MANIFEST = "manifest.json"


class Origin(BaseModel, frozen=True, field_title_generator=field_title):
    """What something was made from: an artifact, or a file or model of the user's; and how its content is known."""

    kind: str = Field(description="What the artifact is.")
    uri: str = Field(description="Where it is: a path or gs:// address, of a file or (an adapter) a folder.")
    sha256: str = Field(description="Digest of its content; an adapter's is that of its COMMITTED.json.")
    manifest: str | None = Field(None, description="Where its manifest.json is, which says what it was made from.")


class Reference(Origin, extra="forbid"):
    """What stages hand each other: where an artifact is and what it must contain, never the data itself."""

    size: int = Field(description="Size of the file, in bytes.")
    rows: int = Field(description="Rows that the file holds.")

    @property
    def folder(self) -> str:
        """The folder of the stage's files: that of the manifest."""
        return posixpath.dirname(self.manifest or self.uri)

    def sibling(self, name: str) -> str:
        """Return the uri of another file that the stage left in the same folder."""
        return posixpath.join(self.folder, name)


OriginT = TypeVar("OriginT", bound=Origin)
RefT = TypeVar("RefT", bound=Reference)
ConfigT = TypeVar("ConfigT", bound=BaseModel)


class PromptsRef(Reference):
    """Validated, de-duplicated prompts: `prompts.jsonl`."""

    kind: Literal["prompts"] = Field("prompts", description="What the artifact is.")


class CompletionsRef(Reference):
    """One row of N completions per prompt: `completions.jsonl`."""

    kind: Literal["completions"] = Field("completions", description="What the artifact is.")


class VerdictsRef(Reference):
    """The completions with every vote on them: `verdicts.jsonl`."""

    kind: Literal["verdicts"] = Field("verdicts", description="What the artifact is.")


class PreferencesRef(Reference):
    """The training pairs, `train.jsonl`; `val.jsonl`, `judged.jsonl` and `quality.json` lie next to it."""

    kind: Literal["preferences"] = Field("preferences", description="What the artifact is.")
    val_rows: int = Field(0, description="Pairs in val.jsonl next to it, held out of the training.")


class AdapterRef(Reference):
    """A finished adapter: `uri` is its folder, `sha256` the digest of its `COMMITTED.json`."""

    kind: Literal["adapter"] = Field("adapter", description="What the artifact is.")


class ChoiceRef(Reference):
    """What the judge said of the checkpoints of a training: `choice.json`."""

    kind: Literal["choice"] = Field("choice", description="What the artifact is.")
    adapter: AdapterRef = Field(description="The checkpoint that was chosen.")


class EvaluationRef(Reference):
    """A win rate with its interval: `win_rate.json`; `comparisons.jsonl` lies next to it."""

    kind: Literal["evaluation"] = Field("evaluation", description="What the artifact is.")
    adapter_sha256: str = Field(description="Digest of the adapter that was evaluated.")
    win_rate: float = Field(description="Share of the samples it won against the SFT adapter's, ties as halves.")
    lower: float = Field(description="Lower bound of the win rate's interval.")
    upper: float = Field(description="Upper bound of the win rate's interval.")

    proven: float | None = Field(
        None, description="Lower bound that the gate looks at: the lower one of raw and length-controlled win rate."
    )
    null_holds: bool = Field(
        True, description="Whether the SFT adapter against itself came out even, and wrote something."
    )

    def beats(self, bar: float) -> bool:
        """Tell whether the adapter passes the gate: its lower bounds are over `bar`, and the null test holds."""
        return self.null_holds and min(self.lower, self.lower if self.proven is None else self.proven) > bar


class PromotionRef(Reference):
    """The pointer `CURRENT.json` as it stood after the promotion."""

    kind: Literal["promotion"] = Field("promotion", description="What the artifact is.")
    name: str = Field(description="Name under which clients know the adapter.")
    adapter_sha256: str = Field(description="Digest of the adapter that is served.")


def _by_kind(value: object) -> object:
    """Read a reference as its kind says, whichever stage's folder the kind is defined in."""
    if not isinstance(value, dict):
        return value
    kinds = {kind.model_fields["kind"].default: kind for kind in Reference.__subclasses__()}
    return kinds.get(value.get("kind"), Reference).model_validate(value, extra="ignore")


Artifact = Annotated[SerializeAsAny[Reference], BeforeValidator(_by_kind)]


class PipelineResult(BaseModel, frozen=True):
    """What a pipeline run made; `promotion` is None if the adapter did not win by enough, or was `declined`.

    `completions` is None for a run that began with pairs.

    `others` is what stages made that are not named here, by the stage.
    """

    completions: CompletionsRef | None = None
    preferences: PreferencesRef
    adapter: AdapterRef
    evaluation: EvaluationRef
    others: dict[str, Artifact] = {}
    promotion: PromotionRef | None = None
    declined: str | None = None

    def references(self) -> list[Reference]:
        """Return everything that a finished run must still have."""
        made = (self.completions, self.preferences, self.adapter, self.evaluation, *self.others.values())
        return [reference for reference in made if reference is not None]


class FileFacts(BaseModel, frozen=True):
    """The size in bytes and the digest of one file."""

    size: int
    sha256: str


class Cost(BaseModel, frozen=True, extra="forbid"):
    """Something used, or saved: requests, tokens (completion includes thinking), GPU seconds and US$.

    `batch_prompt_tokens` and `batch_completion_tokens` are those of the tokens that came through a batch API.
    """

    requests: int = Field(0, ge=0)
    prompt_tokens: int = Field(0, ge=0)
    completion_tokens: int = Field(0, ge=0)
    thinking_tokens: int = Field(0, ge=0)
    batch_prompt_tokens: int = Field(0, ge=0)
    batch_completion_tokens: int = Field(0, ge=0)
    gpu_seconds: float = Field(0.0, ge=0)
    usd: float = Field(0.0, ge=0)

    def __add__(self, other: Self) -> Self:
        ours, theirs = self.__dict__, other.__dict__
        return type(self)(**{name: value + theirs[name] for name, value in ours.items()})


def canonical_json(value: object) -> bytes:
    """Encode `value` so that equal values give equal bytes (sorted keys, no spaces, UTF-8)."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def digest(value: object) -> str:
    """Return the sha256 (hex) of `value`'s canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that decide results, for a manifest."""
    found = {}
    for name in ("preflow", "prefect", "torch", "transformers", "peft", "trl", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _settings(config: object) -> object:
    return config.model_dump(mode="json") if isinstance(config, BaseModel) else config


class Manifest(BaseModel, frozen=True):
    """How one artifact was made. It is written last: an artifact without one was never finished.

    Attributes:
        artifact: what was made.
        stage: the stage that made it.
        version: of that stage's output.
        key: digest of everything that determines the content.
        config: the stage's settings, as they were.
        upstream: what it was made from.
        files: every file that belongs to the artifact, by its name in the manifest's folder.
        packages: versions of the packages that decide results.
        counts: what became of the rows.
        figures: what was measured, where a number says it.
        cost: what all rows of the artifact cost, whichever run paid for them.
        seconds: wall-clock time that making it took.
    """

    artifact: Artifact
    stage: str
    version: int
    key: str
    config: Annotated[dict[str, JsonValue], BeforeValidator(_settings)] = {}
    upstream: tuple[Origin, ...] = ()
    files: dict[str, FileFacts]
    packages: dict[str, str] = Field(default_factory=package_versions)
    counts: dict[str, int] = {}
    figures: dict[str, float] = {}
    cost: Cost = Cost()
    seconds: float = 0.0

    def settings(self, kind: type[ConfigT]) -> ConfigT:
        """Return `config` as the model that it was written from; fields that are no more are left out."""
        return kind.model_validate(self.config, extra="ignore")

    def found_at(self, uri: str, now: str) -> Self:
        """Return the manifest as found at `uri` in the workspace `now`, which may have been moved or copied since."""
        name = uri.removeprefix(now)
        said = self.artifact.manifest or uri
        if said == uri or not said.endswith(name):
            return self
        before = said.removesuffix(name)

        def moved(reference: OriginT) -> OriginT:
            where = {"uri": reference.uri, "manifest": reference.manifest}
            there = {field: at for field, at in where.items() if at and at.startswith(f"{before}/")}
            return reference.model_copy(update={field: now + at.removeprefix(before) for field, at in there.items()})

        upstream = tuple(moved(origin) for origin in self.upstream)
        return self.model_copy(update={"artifact": moved(self.artifact), "upstream": upstream})

    def origin(self, kind: str) -> Origin | None:
        """Return the first of `upstream` that is of a kind."""
        return next((origin for origin in self.upstream if origin.kind == kind), None)
