"""The objects of the cluster, their resource versions, and the events that a watch gets."""

import asyncio
import copy
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

Object = dict[str, Any]
Selector = Callable[[Object], bool]
SUFFIX_LETTERS = "bcdfghjklmnpqrstvwxz2456789"


class ApiError(Exception):
    """An answer other than 2xx, as the API's `Status` object says it."""

    def __init__(self, code: int, reason: str, message: str, causes: list[Object] | None = None) -> None:
        super().__init__(message)
        self.code = code
        details = {"details": {"causes": causes}} if causes else {}
        self.status: Object = {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
            "reason": reason, "code": code, **details,
        }  # fmt: skip


@dataclass(frozen=True)
class Resource:
    """One kind of object and where it lies in the API."""

    group: str
    plural: str
    kind: str
    namespaced: bool = True
    subresources: tuple[str, ...] = ()

    @property
    def api_version(self) -> str:
        """Group and version, as objects carry them."""
        return f"{self.group}/v1" if self.group else "v1"

    @property
    def name(self) -> str:
        """The name that errors use."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


NAMESPACES = Resource("", "namespaces", "Namespace", namespaced=False)
PODS = Resource("", "pods", "Pod", subresources=("log", "eviction", "exec"))
SECRETS = Resource("", "secrets", "Secret")
EVENTS = Resource("", "events", "Event")
JOBS = Resource("batch", "jobs", "Job")
RESOURCES = (NAMESPACES, PODS, SECRETS, EVENTS, JOBS)


@dataclass(frozen=True)
class Change:
    """One event of an object's life; `before` is what it was until then."""

    version: int
    resource: Resource
    type: str
    object: Object
    before: Object | None


def now() -> str:
    """Return the time as the API writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds_since(stamp: str) -> float:
    """Return how long ago a time of the API was."""
    return (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds()


class Store:
    """All objects. Every change gets the next resource version and wakes those who wait."""

    def __init__(self) -> None:
        self.version = 1000
        self._objects: dict[tuple[Resource, str, str], Object] = {}
        self._history: list[Change] = []
        self._changed = asyncio.Event()

    def get(self, resource: Resource, namespace: str, name: str) -> Object:
        """Return a copy of one object.

        Raises:
            ApiError: 404.
        """
        found = self._objects.get((resource, namespace, name))
        if found is None:
            raise ApiError(404, "NotFound", f'{resource.name} "{name}" not found')
        return copy.deepcopy(found)

    def all(self, resource: Resource, namespace: str = "", selector: Selector = lambda _: True) -> list[Object]:
        """Return copies of the objects of a kind, ordered by name; no namespace: of all."""
        return [
            copy.deepcopy(item)
            for (kind, where, _), item in sorted(self._objects.items(), key=lambda entry: entry[0][1:])
            if kind is resource and namespace in ("", where) and selector(item)
        ]

    def create(
        self, resource: Resource, namespace: str, given: Object, complete: Callable[[Object], None] = lambda _: None
    ) -> Object:
        """Add an object; name, uid, time and version are filled in, and what `complete` adds once these are known.

        Raises:
            ApiError: 409 where the name is taken, 422 where there is none.
        """
        item = {"kind": resource.kind, "apiVersion": resource.api_version, **copy.deepcopy(given)}
        metadata = item.setdefault("metadata", {})
        if not metadata.get("name"):
            metadata["name"] = self._made_up_name(resource, metadata)
        if (resource, namespace, metadata["name"]) in self._objects:
            raise ApiError(409, "AlreadyExists", f'{resource.name} "{metadata["name"]}" already exists')
        if resource.namespaced:
            metadata["namespace"] = namespace
        metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": now()}
        if resource is JOBS:
            metadata["generation"] = 1
        complete(item)
        return self._put(resource, item, "ADDED", None)

    def _made_up_name(self, resource: Resource, metadata: Object) -> str:
        if not metadata.get("generateName"):
            raise ApiError(
                422, "Invalid", f'{resource.kind} "" is invalid: metadata.name: Required value: name or generateName '
                "is required",
            )  # fmt: skip
        return str(metadata["generateName"])[:58] + "".join(random.choices(SUFFIX_LETTERS, k=5))

    def update(self, resource: Resource, item: Object) -> Object:
        """Replace an object; what has not changed makes no event.

        Raises:
            ApiError: 404, or 409 where `resourceVersion` is not the newest.
        """
        metadata = item["metadata"]
        namespace = metadata.get("namespace", "")
        before = self.get(resource, namespace, metadata["name"])
        if metadata.get("uid", before["metadata"]["uid"]) != before["metadata"]["uid"]:
            raise self._conflict(resource, metadata["name"], "the UID in the precondition does not match")
        if (
            metadata.get("resourceVersion", before["metadata"]["resourceVersion"])
            != before["metadata"]["resourceVersion"]
        ):
            raise self._conflict(resource, metadata["name"], "the object has been modified; please apply your "
                                 "changes to the latest version and try again")  # fmt: skip
        item = copy.deepcopy(item)
        item["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"]
        return before if item == before else self._put(resource, item, "MODIFIED", before)

    @staticmethod
    def _conflict(resource: Resource, name: str, why: str) -> ApiError:
        return ApiError(409, "Conflict", f'Operation cannot be fulfilled on {resource.name} "{name}": {why}')

    def delete(self, resource: Resource, namespace: str, name: str) -> Object:
        """Remove an object for good."""
        before = self.get(resource, namespace, name)
        del self._objects[resource, namespace, name]
        return self._note(resource, copy.deepcopy(before), "DELETED", before)

    def _put(self, resource: Resource, item: Object, kind: str, before: Object | None) -> Object:
        item = self._note(resource, item, kind, before)
        metadata = item["metadata"]
        self._objects[resource, metadata.get("namespace", ""), metadata["name"]] = item
        return copy.deepcopy(item)

    def _note(self, resource: Resource, item: Object, kind: str, before: Object | None) -> Object:
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        self._history.append(Change(self.version, resource, kind, copy.deepcopy(item), before))
        self.wake()
        return item

    def wake(self) -> None:
        """Let everybody who waits look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, seconds: float) -> None:
        """Wait for the next change, or so long."""
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._changed.wait()
        except TimeoutError:
            return

    def since(self, version: int, resource: Resource, namespace: str) -> list[Change]:
        """Return what happened to objects of a kind after `version`."""
        return [
            change
            for change in self._history
            if change.version > version
            and change.resource is resource
            and namespace in ("", change.object["metadata"].get("namespace", ""))
        ]
