"""Three ways to a bucket, side by side: python -m tests.benchmarks.bench_gcs

prefect-gcp's GcsBucket block, gcsfs and the workspace write and read small records and a folder, against the same
emulator, behind a proxy that takes 20 ms for every request and logs it. Requests in flight: 16 everywhere.
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from google.auth.credentials import AnonymousCredentials
from prefect_gcp.cloud_storage import GcsBucket
from prefect_gcp.credentials import GcpCredentials

from tasks.store.workspace import PARALLEL_TRANSFERS, Workspace
from tests.fakes.gcs import BUCKET, FakeGcs

RECORDS, FILES = 200, 50


class Way(Protocol):
    """One way to a bucket."""

    def write(self, name: str, content: bytes) -> None:
        """Write one record."""

    def read(self, name: str) -> bytes:
        """Read one record."""

    def put_folder(self, local: Path, name: str) -> None:
        """Upload a folder."""

    def get_folder(self, name: str, local: Path) -> None:
        """Download a folder."""


class Block:
    """prefect-gcp's block, as Prefect's result storage calls it."""

    def __init__(self) -> None:
        self._bucket = GcsBucket(bucket=BUCKET, gcp_credentials=EmulatorCredentials(project="none"))

    def write(self, name: str, content: bytes) -> None:
        """Write one record."""
        self._bucket.write_path(name, content)

    def read(self, name: str) -> bytes:
        """Read one record."""
        return bytes(self._bucket.read_path(name))

    def put_folder(self, local: Path, name: str) -> None:
        """Upload a folder."""
        self._bucket.put_directory(local_path=str(local), to_path=name)

    def get_folder(self, name: str, local: Path) -> None:
        """Download a folder."""
        self._bucket.get_directory(from_path=name, local_path=str(local))


class Gcsfs:
    """gcsfs, as the workspace used it before: md5 checked, folders through its own batches."""

    def __init__(self, url: str) -> None:
        # Otherwise it asks for the layout of the bucket before all else.
        os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
        import gcsfs

        self._fs = gcsfs.GCSFileSystem(endpoint_url=url, use_listings_cache=False, token="anon", consistency="md5")

    def write(self, name: str, content: bytes) -> None:
        """Write one record."""
        self._fs.pipe_file(f"{BUCKET}/{name}", content)

    def read(self, name: str) -> bytes:
        """Read one record."""
        return bytes(self._fs.cat_file(f"{BUCKET}/{name}"))

    def put_folder(self, local: Path, name: str) -> None:
        """Upload a folder."""
        self._fs.put(f"{local}/", f"{BUCKET}/{name}/", recursive=True, batch_size=PARALLEL_TRANSFERS)

    def get_folder(self, name: str, local: Path) -> None:
        """Download a folder."""
        self._fs.get(f"{BUCKET}/{name}/", f"{local}/", recursive=True, batch_size=PARALLEL_TRANSFERS)


class Ours:
    """The workspace; a folder is committed with its manifest and verified when it is fetched."""

    def __init__(self) -> None:
        self._store = Workspace(f"gs://{BUCKET}")

    def write(self, name: str, content: bytes) -> None:
        """Write one record."""
        self._store.write_bytes(self._store.uri(name), content)

    def read(self, name: str) -> bytes:
        """Read one record."""
        return self._store.read_bytes(self._store.uri(name))

    def put_folder(self, local: Path, name: str) -> None:
        """Upload a folder."""
        self._store.commit_folder(local, self._store.uri(name))

    def get_folder(self, name: str, local: Path) -> None:
        """Download a folder."""
        self._store.fetch_folder(self._store.uri(name), local)


class EmulatorCredentials(GcpCredentials):
    """Credentials whose client speaks to the emulator; making one costs no request, as with real ones."""

    def get_credentials_from_service_account(self) -> Any:
        """Return credentials that need none."""
        return AnonymousCredentials()

    def get_cloud_storage_client(self, project: str | None = None) -> Any:
        """Return a new client, as the block's own credentials do."""
        from google.cloud import storage

        return storage.Client.create_anonymous_client()


def measure(gcs: FakeGcs, action: Callable[[], object]) -> tuple[float, int, float]:
    """Return wall-clock seconds, requests and CPU seconds of an action."""
    before, start, cpu = sum(gcs.counts(buckets=True).values()), time.perf_counter(), time.process_time()
    action()
    seconds, used = time.perf_counter() - start, time.process_time() - cpu
    return seconds, sum(gcs.counts(buckets=True).values()) - before, used


def run(way: Way, label: str, gcs: FakeGcs, folder: Path) -> list[tuple[float, int, float]]:
    """Write and read records and a folder, and check what came back."""
    contents = {f"{label}/record-{number}": f'{{"number": {number}}}'.encode() * 20 for number in range(RECORDS)}
    local = folder / "local"

    def write() -> None:
        with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
            list(pool.map(way.write, contents, contents.values()))

    def read() -> None:
        with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
            assert dict(zip(contents, pool.map(way.read, contents), strict=True)) == contents

    found = folder / label
    measures = [
        measure(gcs, action)
        for action in (
            write,
            read,
            lambda: way.put_folder(local, f"{label}-folder"),
            lambda: way.get_folder(f"{label}-folder", found),
        )
    ]
    got = {path.name: path.read_bytes() for path in found.rglob("*.bin")}
    assert got == {path.name: path.read_bytes() for path in local.iterdir()}, f"{label}: files differ"
    return measures


def main() -> None:
    """Run all three and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency-ms", type=float, default=20)
    options = parser.parse_args()
    print("| way | 200 records written | read | 50 files up | down |\n| --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name, FakeGcs({"latency_ms": options.latency_ms}) as gcs:
        folder, rng = Path(name), random.Random(0)
        (folder / "local").mkdir()
        for number in range(FILES):
            (folder / "local" / f"{number}.bin").write_bytes(rng.randbytes(100_000))
        ways: dict[str, Way] = {"GcsBucket": Block(), "gcsfs": Gcsfs(gcs.url), "workspace": Ours()}
        for label, way in ways.items():
            cells = [f"{s:.2f} s, {n} requests, {cpu:.2f} s CPU" for s, n, cpu in run(way, label, gcs, folder)]
            print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
