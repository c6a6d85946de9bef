"""Files on a local disk: written next to their place and renamed, compared and swapped under a lock."""

import errno
import fcntl
import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import IO

from tasks.store.storage import DigestWriter, Stat, Storage

SETTLED_SECONDS = 5.0
# A text that is no path, such as a prompt itself, is too long for one.
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
UNFINISHED = ".writing-"


class LocalStorage(Storage):
    """The disks of this machine, and those that it shares."""

    def stat(self, uri: str) -> Stat | None:
        """Its times tell two contents apart only once they are older than any clock's step."""
        try:
            found = os.stat(uri)
        except OSError as error:
            if error.errno not in ABSENT:
                raise
            return None
        settled = time.time() - found.st_ctime > SETTLED_SECONDS
        version = (found.st_ino, found.st_mtime_ns, found.st_ctime_ns) if settled else None
        return Stat(uri, found.st_size, version=version) if S_ISREG(found.st_mode) else None

    def open(self, uri: str, start: int = 0, end: int | None = None) -> IO[bytes]:
        """Only a part with an end is held in memory."""
        file = open(uri, "rb")  # noqa: SIM115  the caller closes it
        file.seek(start)
        if end is None:
            return file
        with file:
            return io.BytesIO(file.read(max(0, end - start)))

    def scan(self, uri: str, deep: bool = False) -> tuple[dict[str, Stat], list[str]]:
        """A file that goes meanwhile is left out, and so is one that a killed process had not finished."""
        try:
            paths = list(Path(uri).rglob("*") if deep else Path(uri).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return {}, []
        wanted = [path for path in paths if not path.name.startswith(UNFINISHED)]
        stats = {str(path.relative_to(uri)): self.stat(str(path)) for path in wanted}
        files = {name: stat for name, stat in stats.items() if stat is not None}
        return files, [] if deep else [path.name for path in paths if path.name not in files and path.is_dir()]

    @contextmanager
    def writing(self, uri: str) -> Iterator[DigestWriter]:
        """Nothing is left of it where the process is killed but a hidden file."""
        folder = Path(uri).parent
        folder.mkdir(parents=True, exist_ok=True)
        # Closing it writes what is buffered, and may find the disk full.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=UNFINISHED, delete=False) as staged:
            try:
                yield DigestWriter(staged)
                staged.flush()
                os.fsync(staged.fileno())
                os.chmod(staged.name, 0o644)
                os.replace(staged.name, uri)
            finally:
                Path(staged.name).unlink(missing_ok=True)

    def remove(self, uri: str) -> None:
        Path(uri).unlink(missing_ok=True)

    def remove_tree(self, uri: str) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(uri)

    def read_versioned(self, uri: str) -> tuple[bytes | None, object]:
        """The version is the content itself."""
        try:
            content = Path(uri).read_bytes()
        except FileNotFoundError:
            return None, None
        return content, content

    def swap(self, uri: str, content: bytes, version: object) -> object | None:
        """Compare and replace under a lock that dies with its process."""
        path = Path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.read_versioned(uri)[1] != version:
                return None
            with self.writing(uri) as out:
                out.write(content)
            return content
