"""The cluster that tests use: the double, in a process of its own, or a real one that the environment names.

PREFLOW_TEST_KUBECONFIG   kubeconfig of a real cluster; without it the double is started
PREFLOW_TEST_NAMESPACE    namespace for Jobs (preflow)
PREFLOW_TEST_IMAGE        the train image, as the cluster pulls it
PREFLOW_TEST_WORKSPACE    gs:// address that pods and these tests read and write
PREFLOW_TEST_API_URL      address of these tests' Prefect server as pods reach it; {port} is replaced
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import yaml

ROOT = Path(__file__).resolve().parents[3]
ADMIN = "admin"


def kubeconfig(file: Path, server: str, user: str, namespace: str) -> Path:
    """Write a kubeconfig with a bearer token, which for the double is the user's name."""
    context = {"cluster": "double", "user": user, "namespace": namespace}
    content = {
        "apiVersion": "v1", "kind": "Config", "current-context": "double", "preferences": {},
        "clusters": [{"name": "double", "cluster": {"server": server}}],
        "users": [{"name": user, "user": {"token": user}}],
        "contexts": [{"name": "double", "context": context}],
    }  # fmt: skip
    file.write_text(yaml.safe_dump(content))
    return file


@dataclass
class FakeKubernetes:
    """A running double; `settings` are the fields of `tests.fakes.kubernetes.server.Config`.

    Use as a context manager: leaving it kills every container.
    """

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    url: str = ""
    _process: subprocess.Popen[str] | None = None

    @property
    def namespace(self) -> str:
        """The namespace that exists."""
        return str(self.settings.get("namespace", "preflow"))

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "config.json"
        config.write_text(json.dumps({"folder": str(self.folder), "root": str(ROOT), **self.settings}))
        with (self.folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fakes.kubernetes.server", "--config", str(config)],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("listening on "):
            raise RuntimeError(f"the double did not start: {(self.folder / 'server.log').read_text()}")
        self.url = line.removeprefix("listening on ").strip()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.communicate(timeout=60)

    def kubeconfig(self, user: str = ADMIN) -> Path:
        """Return a kubeconfig for a user."""
        return kubeconfig(self.folder / f"kubeconfig-{user}", self.url, user, self.namespace)

    def order(self, fault: str, **given: str | float) -> Any:
        """Order a fault, or ask for a pod's processes."""
        answer = httpx.post(f"{self.url}/_control/{fault}", params=given, timeout=30)
        assert answer.is_success, answer.text
        return answer.json()

    def requests(self, user: str) -> list[dict[str, Any]]:
        """Return what a user asked of the API, in order."""
        rows = [json.loads(line) for line in (self.folder / "requests.jsonl").read_text().splitlines()]
        return [row for row in rows if row["user"] == user]

    def errors(self) -> str:
        """Return what the double itself complained about."""
        return (self.folder / "server.log").read_text()
