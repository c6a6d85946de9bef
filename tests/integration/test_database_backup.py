"""infra/k8s/database.sh on a real PostgreSQL that a Prefect server uses; kubectl runs its command on this machine."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tasks.demo.services import Service, free_port, prefect_server
from tests.fakes.process import ROOT

BINARIES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
LIST = "SELECT datname FROM pg_database"
NOBODY = 65534  # PostgreSQL refuses to run as root
KUBECTL = """#!/bin/bash
echo "$@" >>{folder}/commands
while [ $# -gt 0 ]; do
    if [ "$1" = -- ]; then shift; exec "$@"; fi
    shift
done
"""

pytestmark = [
    pytest.mark.long,  # a Prefect server with an empty database, three times
    pytest.mark.skipif(BINARIES is None, reason="no PostgreSQL here (apt: postgresql)"),
]


@dataclass
class Database:
    """A PostgreSQL with the database `prefect`, and how its programs and a server's find it."""

    folder: Path
    port: int

    @property
    def options(self) -> list[str]:
        return ["--host", str(self.folder), "--port", str(self.port), "--username", "prefect"]

    def run(self, program: str, *arguments: str) -> str:
        command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if os.getuid() == 0 else []
        command += [f"{BINARIES}/{program}", *arguments]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=self.folder).stdout

    def script(self, *arguments: str) -> None:
        """Run database.sh with a kubectl that executes here what it is to execute in the pod."""
        (self.folder / "kubectl").write_text(KUBECTL.format(folder=self.folder))
        (self.folder / "kubectl").chmod(0o755)
        path = f"{self.folder}:{BINARIES}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PGHOST": str(self.folder), "PGPORT": str(self.port)}
        command = [str(ROOT / "infra" / "k8s" / "database.sh"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    def server(self) -> Service:
        service = prefect_server(self.folder / "prefect")
        url = f"postgresql+asyncpg://prefect@127.0.0.1:{self.port}/prefect"
        service.environment = {**service.environment, "PREFECT_SERVER_DATABASE_CONNECTION_URL": url}
        return service


@pytest.fixture
def database() -> Iterator[Database]:
    folder = Path(tempfile.mkdtemp(prefix="preflow-postgres-"))
    if os.getuid() == 0:
        shutil.chown(folder, NOBODY, NOBODY)
    found = Database(folder, free_port())
    found.run("initdb", "--pgdata", f"{folder}/data", "--username", "prefect", "--auth", "trust")
    options = f"-k {folder} -p {found.port} -c listen_addresses=127.0.0.1 -c fsync=off"
    found.run("pg_ctl", "start", "--wait", "--pgdata", f"{folder}/data", "--log", f"{folder}/log", "--options", options)
    try:
        found.run("createdb", *found.options, "prefect")
        yield found
    finally:
        found.run("pg_ctl", "stop", "--mode", "immediate", "--pgdata", f"{folder}/data")
        shutil.rmtree(folder)


def ask(server: Service, method: str, path: str, body: object = None) -> list[str]:
    answer = httpx.request(method, f"http://127.0.0.1:{server.port}/api{path}", json=body, timeout=60)
    answer.raise_for_status()
    found = answer.json() if answer.content else []
    return [item["name"] for item in found] if isinstance(found, list) else []


def test_what_was_backed_up_is_there_again_and_what_came_later_is_not(database: Database, tmp_path: Path) -> None:
    with database.server() as server:
        for name in ("first", "second"):
            ask(server, "POST", "/variables/", {"name": name, "value": 1})
        database.script("backup", str(tmp_path / "save"))
        ask(server, "DELETE", "/variables/name/first")
        ask(server, "POST", "/variables/", {"name": "later", "value": 1})
    database.script("restore", str(tmp_path / "save"))
    with database.server() as server:
        assert ask(server, "POST", "/variables/filter", {"sort": "NAME_ASC"}) == ["first", "second"]
    found = database.run("psql", *database.options, "--tuples-only", "--command", LIST, "prefect")
    assert set(found.split()) == {"postgres", "prefect", "template0", "template1"}, "and no other is left"
