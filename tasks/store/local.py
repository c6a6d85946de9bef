"""What a workspace needs of the place it lies in, and that on a local disk; `gcs.py` has it on Google Cloud Storage."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol


@dataclass(frozen=True)
class Stat:
    """One file: its size in bytes, and its sha256 where that is known without reading it."""

    uri: str
    size: int
    sha256: str | None = None


class Files(Protocol):
    """Files by uri, each absent or whole.

    Raises:
        FileNotFoundError: what is read is not there.
        OSError: anything else that went wrong, for good.
    """

    def stat(self, uri: str) -> Stat | None:
        """Return the facts of a file, or None."""

    def read(self, uri: str, start: int = 0, end: int | None = None) -> bytes:
        """Return the bytes from `start` up to `end`; less where the file ends before."""

    def read_ranges(self, uri: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of each range; in ascending order it is fast."""

    def open(self, uri: str) -> IO[bytes]:
        """Open a whole file for reading from its start to its end."""

    def fetch(self, uri: str, local: Path) -> None:
        """Copy a file to a local path."""

    def sha256(self, uri: str) -> str:
        """Return the sha256 (hex) of a file's content."""

    def stage(self, uri: str) -> IO[bytes]:
        """Return a file to write what shall lie at `uri`, to be published or discarded."""

    def publish(self, staged: IO[bytes], uri: str, sha256: str) -> None:
        """Have what was staged appear, in one step, in the place of what was there."""

    def discard(self, staged: IO[bytes]) -> None:
        """Drop what was staged; after `publish`, do nothing."""

    def files(self, uri: str) -> list[Stat]:
        """Return the files directly below a folder."""

    def folders(self, uri: str) -> list[str]:
        """Return the names of the folders directly below a folder."""

    def tree(self, uri: str) -> dict[str, Stat]:
        """Return all files below a folder by their name relative to it."""

    def remove(self, uri: str) -> None:
        """Delete a file if it is there."""

    def remove_tree(self, uri: str) -> None:
        """Delete a folder and all below it if it is there."""

    def read_versioned(self, uri: str) -> tuple[bytes | None, object]:
        """Return the content (None where there is none) and its version."""

    def swap(self, uri: str, content: bytes, version: object) -> object | None:
        """Replace the content if it still has `version`; return the new version, or None if it had not."""


class LocalFiles:
    """`Files` on a local disk: written beside and renamed; compared and swapped under a lock."""

    def stat(self, uri: str) -> Stat | None:
        """See `Files`."""
        path = Path(uri)
        return Stat(uri, path.stat().st_size) if path.is_file() else None

    def read(self, uri: str, start: int = 0, end: int | None = None) -> bytes:
        """See `Files`."""
        with open(uri, "rb") as file:
            file.seek(start)
            return file.read() if end is None else file.read(end - start)

    def read_ranges(self, uri: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        """See `Files`."""
        found = []
        with open(uri, "rb") as file:
            for start, end in ranges:
                file.seek(start)
                found.append(file.read(end - start))
        return found

    def open(self, uri: str) -> IO[bytes]:
        """See `Files`."""
        return open(uri, "rb")

    def fetch(self, uri: str, local: Path) -> None:
        """See `Files`."""
        shutil.copyfile(uri, local)

    def sha256(self, uri: str) -> str:
        """See `Files`."""
        with open(uri, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def stage(self, uri: str) -> IO[bytes]:
        """See `Files`."""
        folder = Path(uri).parent
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".writing-")
        os.close(handle)
        return open(name, "wb")

    def publish(self, staged: IO[bytes], uri: str, sha256: str) -> None:
        """See `Files`."""
        staged.flush()
        os.fsync(staged.fileno())
        staged.close()
        os.chmod(staged.name, 0o644)
        os.replace(staged.name, uri)

    def discard(self, staged: IO[bytes]) -> None:
        """See `Files`."""
        try:
            staged.close()  # which writes what is buffered, and may find the disk full
        finally:
            Path(staged.name).unlink(missing_ok=True)

    def files(self, uri: str) -> list[Stat]:
        """See `Files`."""
        return [Stat(entry.path, entry.stat().st_size) for entry in _scan(uri) if entry.is_file()]

    def folders(self, uri: str) -> list[str]:
        """See `Files`."""
        return [entry.name for entry in _scan(uri) if entry.is_dir()]

    def tree(self, uri: str) -> dict[str, Stat]:
        """See `Files`."""
        root = Path(uri)
        paths = [path for path in root.rglob("*") if path.is_file()]
        return {str(path.relative_to(root)): Stat(str(path), path.stat().st_size) for path in paths}

    def remove(self, uri: str) -> None:
        """See `Files`."""
        Path(uri).unlink(missing_ok=True)

    def remove_tree(self, uri: str) -> None:
        """See `Files`."""
        with suppress(FileNotFoundError):
            shutil.rmtree(uri)

    def read_versioned(self, uri: str) -> tuple[bytes | None, object]:
        """See `Files`; the version is the content itself."""
        try:
            content = Path(uri).read_bytes()
        except FileNotFoundError:
            return None, None
        return content, content

    def swap(self, uri: str, content: bytes, version: object) -> object | None:
        """See `Files`; the lock dies with its process."""
        path = Path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.read_versioned(uri)[1] != version:
                return None
            staged = self.stage(uri)
            try:
                staged.write(content)
                self.publish(staged, uri, "")
            finally:
                self.discard(staged)
            return content


def _scan(uri: str) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(uri) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
