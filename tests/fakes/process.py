"""Starting the fake endpoint in a process of its own, and reading what it was asked."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]


class FakeOpenAI:
    """A running fake endpoint; `plan` holds the fields of `tests.fakes.plan.Plan`.

    Use as a context manager. `stop()` and `start()` bring it down and up again on the same port, with the same log.
    """

    def __init__(self, plan: dict[str, Any] | None = None, folder: Path | None = None) -> None:
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="fake-openai-")
        folder = folder or Path(self._temporary.name if self._temporary else "")
        folder.mkdir(parents=True, exist_ok=True)
        self._plan = folder / "plan.json"
        self._plan.write_text(json.dumps(plan or {}))
        self.log = folder / "requests.jsonl"
        self._process: subprocess.Popen[str] | None = None
        self._port = 0
        self.url = ""

    def start(self) -> Self:
        """Start the server and wait until it listens."""
        command = [sys.executable, "-m", "tests.fakes.openai_server", "--port", str(self._port)]
        command += ["--plan", str(self._plan), "--log", str(self.log)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("listening on "):
            raise RuntimeError(f"the fake endpoint did not start: {line!r}")
        self.url = line.removeprefix("listening on ").strip()
        self._port = int(self.url.rsplit(":", 1)[1].split("/")[0])
        return self

    def stop(self) -> None:
        """End the server; its log stays."""
        if self._process is not None:
            self._process.terminate()
            self._process.communicate(timeout=30)
            self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self._process else None

    def requests(self, path: str | None = "/v1/chat/completions") -> list[dict[str, Any]]:
        """Return the logged requests to `path` (None: all), in order of arrival."""
        if not self.log.exists():
            return []
        rows = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [row for row in rows if path is None or row["path"] == path]
