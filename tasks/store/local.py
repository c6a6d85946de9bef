"""A workspace on a local disk: files are written next to their place and renamed, compared and swapped under a lock."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import IO

from tasks.store.workspace import Stat, Workspace

SETTLED_SECONDS = 5.0


class LocalWorkspace(Workspace):
    """A folder on this machine, or on a disk that it shares."""

    def stat(self, uri: str) -> Stat | None:
        try:
            found = os.stat(uri)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _stat(uri, found) if S_ISREG(found.st_mode) else None

    def read_bytes(self, uri: str, start: int = 0, end: int | None = None) -> bytes:
        with open(uri, "rb") as file:
            file.seek(start)
            return file.read() if end is None else file.read(end - start)

    def open(self, uri: str) -> IO[bytes]:
        return open(uri, "rb")

    def _list(self, uri: str, deep: bool = False) -> tuple[dict[str, Stat], list[str]]:
        """As for any workspace; a file that goes meanwhile is left out."""
        try:
            paths = list(Path(uri).rglob("*") if deep else Path(uri).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return {}, []
        stats = {str(path.relative_to(uri)): self.stat(str(path)) for path in paths}
        files = {name: stat for name, stat in stats.items() if stat is not None}
        return files, [] if deep else [path.name for path in paths if path.name not in files and path.is_dir()]

    @contextmanager
    def _stage(self, uri: str) -> Iterator[IO[bytes]]:
        folder = Path(uri).parent
        folder.mkdir(parents=True, exist_ok=True)
        # Closing it writes what is buffered, and may find the disk full.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writing-", delete=False) as staged:
            try:
                yield staged
            finally:
                Path(staged.name).unlink(missing_ok=True)

    def _publish(self, staged: IO[bytes], uri: str, sha256: str) -> None:
        staged.flush()
        os.fsync(staged.fileno())
        os.chmod(staged.name, 0o644)
        os.replace(staged.name, uri)

    def _remove(self, uri: str) -> None:
        Path(uri).unlink(missing_ok=True)

    def _remove_tree(self, uri: str) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(uri)

    def read_versioned(self, uri: str) -> tuple[bytes | None, object]:
        """Return the content and the version, which is the content itself."""
        try:
            content = Path(uri).read_bytes()
        except FileNotFoundError:
            return None, None
        return content, content

    def swap(self, uri: str, content: bytes, version: object) -> object | None:
        """Compare and replace under a lock that dies with its process."""
        self._guard()
        path = Path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.read_versioned(uri)[1] != version:
                return None
            with self._stage(uri) as staged:
                staged.write(content)
                self._publish(staged, uri, "")
            return content


def _stat(uri: str, found: os.stat_result) -> Stat:
    """Return a file's facts. Its times tell two contents apart only once they are older than any clock's step."""
    settled = time.time() - found.st_ctime > SETTLED_SECONDS
    version = (found.st_ino, found.st_mtime_ns, found.st_ctime_ns) if settled else None
    return Stat(uri, found.st_size, version=version)
