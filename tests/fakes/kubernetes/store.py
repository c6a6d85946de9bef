"""The objects of the cluster, their resource versions, and the events that a watch gets."""

import asyncio
import copy
import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

Object = dict[str, Any]
Selector = Callable[[Object], bool]
NAMESPACE = "preflow"
# Plural name to group and kind.
KINDS = {
    "pods": ("", "Pod"), "secrets": ("", "Secret"), "events": ("", "Event"), "resourcequotas": ("", "ResourceQuota"),
    "jobs": ("batch", "Job"),
}  # fmt: skip


class ApiError(Exception):
    """An answer other than 2xx, as the API's `Status` object says it."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.status: Object = {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
            "reason": reason, "code": code,
        }  # fmt: skip


@dataclass(frozen=True)
class Change:
    version: int
    plural: str
    type: str
    object: Object


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Store:
    """All objects, of one namespace. Every change gets the next resource version and wakes those who wait."""

    def __init__(self) -> None:
        self.version = 1000
        self._objects: dict[tuple[str, str], Object] = {}
        self._history: list[Change] = []
        self._changed = asyncio.Event()

    def find(self, plural: str, name: str) -> Object | None:
        """Return the object itself; only a block of `changing` may change it."""
        return self._objects.get((plural, name))

    def get(self, plural: str, name: str) -> Object:
        """As `find`.

        Raises:
            ApiError: 404.
        """
        found = self.find(plural, name)
        if found is None:
            raise ApiError(404, "NotFound", f'{plural} "{name}" not found')
        return found

    def all(self, plural: str, selector: Selector = lambda _: True) -> list[Object]:
        """Return the objects of a kind, in the order of their creation."""
        return [item for (kind, _), item in self._objects.items() if kind == plural and selector(item)]

    def create(self, plural: str, given: Object) -> Object:
        """Add an object; its name, if only begun, uid and time are filled in.

        Raises:
            ApiError: 409: the name is taken.
        """
        group, kind = KINDS[plural]
        item = {"kind": kind, "apiVersion": f"{group}/v1".lstrip("/"), **copy.deepcopy(given)}
        metadata = item["metadata"]
        if "name" not in metadata:
            metadata["name"] = metadata["generateName"][:58] + "".join(random.choices("bcdfghjklmnpqrst", k=5))
        if (plural, metadata["name"]) in self._objects:
            raise ApiError(409, "AlreadyExists", f'{plural} "{metadata["name"]}" already exists')
        metadata |= {"namespace": NAMESPACE, "uid": str(uuid.uuid4()), "creationTimestamp": now()}
        self._objects[plural, metadata["name"]] = item
        self._note("ADDED", plural, item)
        return item

    @contextmanager
    def changing(self, plural: str, item: Object) -> Iterator[None]:
        """Make an event of what the block changes in an object."""
        before = copy.deepcopy(item)
        yield
        if item != before and self.find(plural, item["metadata"]["name"]) is item:
            self._note("MODIFIED", plural, item)

    def delete(self, plural: str, item: Object) -> None:
        del self._objects[plural, item["metadata"]["name"]]
        self._note("DELETED", plural, item)

    def _note(self, kind: str, plural: str, item: Object) -> None:
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        self._history.append(Change(self.version, plural, kind, copy.deepcopy(item)))
        self._changed.set()
        self._changed = asyncio.Event()

    def since(self, version: int, plural: str) -> list[Change]:
        """Return what happened to objects of a kind after `version`."""
        return [change for change in self._history if change.version > version and change.plural == plural]

    async def wait(self, seconds: float) -> None:
        """Wait for the next change, or so long."""
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._changed.wait()
        except TimeoutError:
            return


def set_condition(item: Object, kind: str, reason: str = "", message: str = "") -> None:
    """Set a condition of an object's status to True."""
    conditions = item["status"].setdefault("conditions", [])
    conditions[:] = [condition for condition in conditions if condition["type"] != kind]
    conditions.append(
        {"type": kind, "status": "True", "lastTransitionTime": now(), "reason": reason, "message": message}
    )


def has_condition(item: Object, kind: str) -> bool:
    return any(condition["type"] == kind for condition in item["status"].get("conditions", []))
