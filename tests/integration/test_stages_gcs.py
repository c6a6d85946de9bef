"""The stages on a bucket give what they give in a folder, and ask for nothing twice."""

import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.generate import generate_completions
from flows.judge import judge_preferences
from tasks.errors import PreflowError
from tasks.store.workspace import PreferencesRef, Workspace
from tests.fakes import FakeOpenAI
from tests.fakes.gcs import BUCKET, FakeGcs
from tests.integration.test_stages import generation, judging, write_prompts

# Two stages that have nothing to do.
MOST_REQUESTS_OF_A_REPLAY = 16


@pytest.fixture(scope="module")
def bucket() -> Iterator[FakeGcs]:
    with FakeGcs() as fake:
        yield fake


@pytest.fixture
def workspace(bucket: FakeGcs) -> str:
    return f"gs://{BUCKET}/{uuid.uuid4().hex}"


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.timeout(300)
async def test_the_stages_on_a_bucket_give_what_they_give_in_a_folder(
    workspace: str, bucket: FakeGcs, tmp_path: Path
) -> None:
    prompts = str(write_prompts(tmp_path, 60))

    async def run(where: str, fake: FakeOpenAI) -> PreferencesRef:
        completions = await generate_completions(prompts, where, generation(fake))
        return await judge_preferences(completions, where, judging(fake))

    with FakeOpenAI({"outage": {"after": 31, "seconds": 600, "kind": "503"}}, tmp_path / "first") as fake:
        with pytest.raises(PreflowError, match="Everything answered so far is kept"):
            await generate_completions(prompts, workspace, generation(fake, max_outage_seconds=1, max_concurrency=4))
        answered = {row["prompt"] for row in fake.requests() if row["status"] == 200}
    with FakeOpenAI(folder=tmp_path / "second") as fake:
        on_bucket = await run(workspace, fake)
        asked = [row["prompt"] for row in fake.requests() if row["model"] == "sampler"]
        assert len(answered) == 30
        assert len(asked) == 30
        assert not answered & set(asked)
        count = len(fake.requests())
        before = len(bucket.requests())
        assert await run(workspace, fake) == on_bucket
        again = bucket.requests()[before:]
        assert {row["operation"] for row in again} == {"download", "list"}
        # A manifest and a listing say of each artifact that it is whole; the rest is what the report shows.
        repeated = Counter((row["operation"], row["name"]) for row in again).most_common(1)
        assert repeated[0][1] <= 1, f"asked for more than once: {repeated}"
        assert len(again) <= MOST_REQUESTS_OF_A_REPLAY
        for name in ("completions", "verdicts", "preferences", "cache"):
            Workspace(workspace).delete_folder(f"{workspace}/{name}")
        assert await run(workspace, fake) == on_bucket
        assert len(fake.requests()) == count, "what lies on the bucket was asked for again"
        in_folder = await run(str(tmp_path / "ws"), fake)
    assert in_folder.sha256 == on_bucket.sha256
