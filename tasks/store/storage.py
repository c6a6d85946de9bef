"""What a kind of storage does: the few operations that everything else in a workspace is made of."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, Any, TypedDict

from tasks.store.refs import FileFacts


@dataclass(frozen=True)
class Stat:
    """One file: its size in bytes, its sha256 where that is known without reading it, and its version.

    A version stands for this content of the file and no other; None where nothing does.
    """

    uri: str
    size: int
    sha256: str | None = None
    version: object = None

    def is_same(self, earlier: "Stat | None") -> bool:
        """Tell whether the file surely holds what it held at an `earlier` time."""
        return self.version is not None and self == earlier


class Facts(TypedDict):
    """What a reference says of its file."""

    sha256: str
    size: int
    rows: int


class DigestWriter:
    """A binary file that counts lines and bytes and keeps the sha256 of what is written."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._sha256 = hashlib.sha256()
        self.size = 0
        self.rows = 0

    def write(self, content: bytes) -> None:
        """Append `content`."""
        self._raw.write(content)
        self._sha256.update(content)
        self.size += len(content)
        self.rows += content.count(b"\n")

    def write_row(self, row: Mapping[str, object]) -> None:
        """Append one JSON row."""
        self.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    @property
    def sha256(self) -> str:
        """The digest of everything written so far."""
        return self._sha256.hexdigest()

    def facts(self) -> Facts:
        """Return sha256, size (bytes) and rows, as a reference wants them."""
        return {"sha256": self.sha256, "size": self.size, "rows": self.rows}

    @property
    def file(self) -> FileFacts:
        """Size and sha256 of everything written so far, as a manifest wants them."""
        return FileFacts(size=self.size, sha256=self.sha256)


class Storage(ABC):
    """Files by their full uri; any two processes may use the same ones at once.

    FileNotFoundError: what is read is not there; OSError: anything else that goes wrong.
    """

    @abstractmethod
    def stat(self, uri: str) -> Stat | None:
        """Return the facts of a file, or None."""

    @abstractmethod
    def open(self, uri: str, start: int = 0, end: int | None = None) -> IO[bytes]:
        """Open a file for reading, from byte `start` up to byte `end` or its own end, whichever comes first."""

    @abstractmethod
    def scan(self, uri: str, deep: bool = False) -> tuple[dict[str, Stat], list[str]]:
        """Return the files below a folder by their name relative to it, and the folders' names; of an absent one none.

        `deep`: all files below it, and no folders; else what is directly below it.
        """

    @abstractmethod
    def writing(self, uri: str) -> AbstractContextManager[DigestWriter]:
        """Stream a file, which appears in one step when the block ends without an error, and not at all otherwise."""

    @abstractmethod
    def remove(self, uri: str) -> None:
        """Delete a file if it is there."""

    @abstractmethod
    def remove_tree(self, uri: str) -> None:
        """Delete a folder and all below it if it is there."""

    @abstractmethod
    def read_versioned(self, uri: str) -> tuple[bytes | None, object]:
        """Return a file's content (None where there is none) and its version, for `swap`."""

    @abstractmethod
    def swap(self, uri: str, content: bytes, version: object) -> object | None:
        """Replace a file if it still has `version`, whoever else writes; return the new version, or None if not."""
