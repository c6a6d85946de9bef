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
from typing import Any, NamedTuple

from google.auth.credentials import AnonymousCredentials
from prefect_gcp.cloud_storage import GcsBucket
from prefect_gcp.credentials import GcpCredentials

from tasks.store.workspace import PARALLEL_TRANSFERS, Workspace
from tests.fakes.gcs import BUCKET, FakeGcs

RECORDS, FILES = 200, 50


class Way(NamedTuple):
    """One way to a bucket."""

    write: Callable[[str, bytes], object]
    read: Callable[[str], bytes]
    put_folder: Callable[[Path, str], object]
    get_folder: Callable[[str, Path], object]


class EmulatorCredentials(GcpCredentials):
    """Credentials whose client speaks to the emulator; making one costs no request, as with real ones."""

    def get_credentials_from_service_account(self) -> Any:
        """Return credentials that need none."""
        return AnonymousCredentials()

    def get_cloud_storage_client(self, project: str | None = None) -> Any:
        """Return a new client, as the block's own credentials do."""
        from google.cloud import storage

        return storage.Client.create_anonymous_client()


def block() -> Way:
    """Return prefect-gcp's block, as Prefect's result storage calls it."""
    bucket = GcsBucket(bucket=BUCKET, gcp_credentials=EmulatorCredentials(project="none"))
    return Way(
        bucket.write_path,
        bucket.read_path,
        lambda local, name: bucket.put_directory(local_path=str(local), to_path=name),
        lambda name, local: bucket.get_directory(from_path=name, local_path=str(local)),
    )


def gcsfs(url: str) -> Way:
    """Return gcsfs, as the workspace used it before: md5 checked, folders through its own batches."""
    # Otherwise it asks for the layout of the bucket before all else.
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    from gcsfs import GCSFileSystem

    fs = GCSFileSystem(endpoint_url=url, use_listings_cache=False, token="anon", consistency="md5")
    batches = {"recursive": True, "batch_size": PARALLEL_TRANSFERS}
    return Way(
        lambda name, content: fs.pipe_file(f"{BUCKET}/{name}", content),
        lambda name: bytes(fs.cat_file(f"{BUCKET}/{name}")),
        lambda local, name: fs.put(f"{local}/", f"{BUCKET}/{name}/", **batches),
        lambda name, local: fs.get(f"{BUCKET}/{name}/", f"{local}/", **batches),
    )


def ours() -> Way:
    """Return the workspace; a folder is committed with its manifest and verified when it is fetched."""
    store = Workspace(f"gs://{BUCKET}")
    return Way(
        lambda name, content: store.write_bytes(store.uri(name), content),
        lambda name: store.read_bytes(store.uri(name)),
        lambda local, name: store.commit_folder(local, store.uri(name)),
        lambda name, local: store.fetch_folder(store.uri(name), local),
    )


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
    folders = (lambda: way.put_folder(local, f"{label}-folder"), lambda: way.get_folder(f"{label}-folder", found))
    measures = [measure(gcs, action) for action in (write, read, *folders)]
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
        ways = {"GcsBucket": block(), "gcsfs": gcsfs(gcs.url), "workspace": ours()}
        for label, way in ways.items():
            cells = [f"{s:.2f} s, {n} requests, {cpu:.2f} s CPU" for s, n, cpu in run(way, label, gcs, folder)]
            print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
