"""Files on Google Cloud Storage, through Google's own client.

Every request is retried; every whole object is checked against its crc32c on the way up (by the server, which refuses
a cut or altered one) and on the way down. An object carries its sha256 as metadata, so that nothing need be read again
to know what it holds.
"""

import asyncio
import errno
import functools
import hashlib
import http.client
import io
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import IO, Any, cast

import httpx
import requests
import urllib3
from google.api_core import exceptions as api
from google.api_core.retry import Retry
from google.auth.exceptions import GoogleAuthError, TransportError
from google.cloud import storage  # type: ignore[attr-defined,import-untyped,unused-ignore]
from google.cloud.storage.exceptions import (  # type: ignore[import-untyped,unused-ignore]
    DataCorruption,
    InvalidResponse,
)

from tasks.errors import PreflowError
from tasks.store.storage import DigestWriter, Stat, Storage

logger = logging.getLogger(__name__)

TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
BROKEN = (ConnectionError, requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError,
          urllib3.exceptions.HTTPError, http.client.HTTPException, TransportError, DataCorruption)  # fmt: skip
# How long a bucket that is down is waited for, and one attempt: to connect, and between two pieces of an answer.
PATIENCE_SECONDS = 300.0
TIMEOUT_SECONDS = (10.0, 60.0)
LONGEST_RETRY_AFTER = 60.0
CONNECTIONS = 32
PARALLEL_DELETES = 16
# Held in memory up to here, and on the local disk beyond.
SPOOLED = 8 << 20
_blocks: dict[str, str] = {}
LISTED = "items(name,size,generation,metadata),prefixes,nextPageToken"


def is_transient(error: Exception) -> bool:
    """Tell whether a request may succeed if it is made again."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None) or getattr(error, "code", None)
    return status in TRANSIENT_STATUS or isinstance(error, BROKEN)


def _wait_as_told(error: Exception) -> None:
    """Wait for what Retry-After asks for; the usual growing pause comes on top."""
    logger.debug("a request to the bucket failed and is made again: %s", error)
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    told = str(headers.get("Retry-After", ""))
    if told.isdigit():
        time.sleep(min(float(told), LONGEST_RETRY_AFTER))


RETRY = Retry(
    predicate=is_transient, initial=0.25, multiplier=2, maximum=30, timeout=PATIENCE_SECONDS, on_error=_wait_as_told
)
POLICY: dict[str, object] = {"retry": RETRY, "timeout": TIMEOUT_SECONDS}


@functools.lru_cache
def _client(process: int, emulator: str | None, block: str) -> Any:
    """Return the client of a process (no connection survives a fork), with a block's credentials if one is named."""
    # Otherwise a missing object makes the client ask for the bucket's own data, which takes a right of its own.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    if block:
        client = _load_credentials(block).get_cloud_storage_client()
    else:
        client = storage.Client.create_anonymous_client() if emulator else storage.Client(project=None)
    client._bucket_metadata_cache = None
    adapter = requests.adapters.HTTPAdapter(pool_connections=4, pool_maxsize=CONNECTIONS)
    for scheme in ("http://", "https://"):
        client._http.mount(scheme, adapter)
    return client


def _load_credentials(block: str) -> Any:
    """Return a GcpCredentials block. Prefect's client gets a loop of its own: this may be called inside another one."""
    from prefect_gcp import GcpCredentials

    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(copy_context().run, asyncio.run, GcpCredentials.aload(block)).result()
    except ValueError as error:
        raise PreflowError(
            f"gs://{block}@...: there is no GcpCredentials block {block!r}. Create it in the Prefect UI (Blocks > GCP "
            f"Credentials), or with: PREFLOW_GCP_CREDENTIALS={block} deployments/register.sh"
        ) from error
    except (httpx.HTTPError, OSError, RuntimeError) as error:
        raise PreflowError(
            f"gs://{block}@...: the GcpCredentials block {block!r} could not be loaded from the Prefect server "
            f"({type(error).__name__}): check PREFECT_API_URL"
        ) from error


@contextmanager
def _object(uri: str) -> Iterator[tuple[Any, str]]:
    """Give the bucket and the object's name of gs://bucket/name or gs://BLOCK@bucket/name.

    What goes wrong in the block is raised as the error that a local file would give.
    """
    authority, _, name = uri.removeprefix("gs://").partition("/")
    block, _, bucket = authority.rpartition("@")
    try:
        client = _client(os.getpid(), os.environ.get("STORAGE_EMULATOR_HOST"), block or _blocks.get(bucket, ""))
        yield client.bucket(bucket), name.rstrip("/")
    except api.NotFound as error:
        raise FileNotFoundError(errno.ENOENT, "no such object or bucket", uri) from error
    except (api.Forbidden, api.Unauthorized, GoogleAuthError) as error:
        raise PermissionError(errno.EACCES, f"not allowed, or no valid credentials ({error})", uri) from error
    except (api.GoogleAPIError, InvalidResponse, *BROKEN) as error:
        cause = getattr(error, "cause", None) or error
        raise OSError(errno.EIO, f"the bucket did not do it ({type(cause).__name__}: {cause})", uri) from error


class GcsStorage(Storage):
    """The objects of a bucket: one object a file, replaced in one step, no rename.

    gs://BLOCK@bucket/prefix takes the credentials of a GcpCredentials block. All of this process that is in the same
    bucket takes them too: what was made there under an address without the block can be read.
    """

    def __init__(self, root: str) -> None:
        block, _, bucket = root.split("/")[2].rpartition("@")
        if block:
            _blocks[bucket] = block

    def stat(self, uri: str) -> Stat | None:
        with _object(uri) as (bucket, name):
            blob = bucket.get_blob(name, **POLICY)
        return None if blob is None else _stat(uri, blob)

    def open(self, uri: str, start: int = 0, end: int | None = None) -> IO[bytes]:
        """Fetch it first: a whole object's crc32c is then known to be right; that of a part cannot be checked."""
        file = tempfile.SpooledTemporaryFile(SPOOLED)  # noqa: SIM115  the caller closes it
        try:
            if end is None or end > start:
                self._copy(uri, file, start or None, None if end is None else end - 1)
        except OSError as error:
            if not isinstance(error.__cause__, api.RequestRangeNotSatisfiable):
                raise
        file.seek(0)
        return file

    def _copy(self, uri: str, out: Any, start: int | None = None, end: int | None = None) -> int:
        """Write an object, or the bytes from `start` to and including `end`, to `out`; return its generation.

        A download that is cut starts again: the client would resume it in the old generation, which may be gone.
        """

        def attempt() -> int:
            out.seek(0)
            out.truncate()
            blob = bucket.blob(name)
            blob.download_to_file(out, start=start, end=end, retry=None, timeout=TIMEOUT_SECONDS, checksum="crc32c")
            return int(blob.generation or 0)

        with _object(uri) as (bucket, name):
            return int(cast(Retry, POLICY["retry"])(attempt)())

    def scan(self, uri: str, deep: bool = False) -> tuple[dict[str, Stat], list[str]]:
        """The objects below a prefix, and the prefixes."""
        with _object(uri) as (bucket, name):
            prefix, delimiter = f"{name}/" if name else "", None if deep else "/"
            found = bucket.client.list_blobs(bucket, prefix=prefix, delimiter=delimiter, fields=LISTED, **POLICY)
            stats = {blob.name.removeprefix(prefix): _stat(uri, blob) for blob in found if blob.name[-1] != "/"}
        return stats, [folder.removeprefix(prefix).rstrip("/") for folder in found.prefixes]

    @contextmanager
    def writing(self, uri: str) -> Iterator[DigestWriter]:
        """Upload at the end; an object that differs from its crc32c is refused by the server."""
        with tempfile.SpooledTemporaryFile(SPOOLED) as staged:
            yield (out := DigestWriter(staged))
            with _object(uri) as (bucket, name):
                blob = bucket.blob(name)
                blob.metadata = {"sha256": out.sha256}
                blob.upload_from_file(staged, rewind=True, size=out.size, checksum="crc32c", **POLICY)

    def remove(self, uri: str) -> None:
        with suppress(FileNotFoundError), _object(uri) as (bucket, name):
            bucket.delete_blob(name, **POLICY)

    def remove_tree(self, uri: str) -> None:
        with ThreadPoolExecutor(PARALLEL_DELETES) as pool:
            list(pool.map(self.remove, [stat.uri for stat in self.scan(uri, deep=True)[0].values()]))

    def read_versioned(self, uri: str) -> tuple[bytes | None, object]:
        """The version is the object's generation, 0 where there is none."""
        out = io.BytesIO()
        try:
            generation = self._copy(uri, out)
        except FileNotFoundError:
            return None, 0
        return out.getvalue(), generation

    def swap(self, uri: str, content: bytes, version: object) -> object | None:
        """Upload if the object has the generation `version`."""
        mark = uuid.uuid4().hex
        with _object(uri) as (bucket, name):
            blob = bucket.blob(name)
            blob.metadata = {"sha256": hashlib.sha256(content).hexdigest(), "swap": mark}
            try:
                blob.upload_from_string(content, if_generation_match=version, checksum="crc32c", **POLICY)
            except api.PreconditionFailed:
                # Where the answer to an upload was lost, the second attempt finds the first one's object.
                there = bucket.get_blob(name, **POLICY)
                is_ours = there is not None and (there.metadata or {}).get("swap") == mark
                return int(there.generation) if is_ours else None
            return int(blob.generation)


def _stat(neighbour: str, blob: Any) -> Stat:
    """Return the facts of an object; `neighbour` is an address in the same bucket."""
    root = "/".join(neighbour.split("/", 3)[:3])
    return Stat(f"{root}/{blob.name}", int(blob.size), (blob.metadata or {}).get("sha256"), blob.generation)
