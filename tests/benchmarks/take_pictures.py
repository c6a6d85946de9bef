"""Take the pictures of the documentation from a server that has runs to show.

Start `make up` (or any Prefect server with runs of preflow), then

    .venv/bin/python -m tests.benchmarks.take_pictures --api http://127.0.0.1:4200/api --page report=REPORT.HTML

What the server has nothing of (no sweep has run, say) is left out and said so. Without --api only the pages in files.
"""

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import Page

from tests.browser import PrefectUi, open_browser

LARGEST = 150_000
# Pages of artifacts, by the start of their key; the newest of each is shown.
ARTIFACTS = ("report", "evaluation", "preferences", "training", "sweep", "promotion", "rollback")
# Runs, by the name of their flow.
RUNS = ("dpo-pipeline", "dpo-sweep", "promote-adapter", "rollback-adapter", "roll-back")


class Server:
    """What the Prefect server has to show."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=60)

    def _all(self, kind: str, **body: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._client.post(f"/{kind}/filter", json=body).raise_for_status().json()
        return found

    def pages(self) -> Iterator[tuple[str, str]]:
        """Yield name and path of every page that there is."""
        yield "deployments", "/deployments"
        flows = {flow["id"]: flow["name"] for flow in self._all("flows")}
        for deployment in self._all("deployments"):
            if flows[deployment["flow_id"]] == "dpo-pipeline":
                yield "form", f"/deployments/deployment/{deployment['id']}/run"
        yield "runs", "/runs"
        newest: dict[str, str] = {}
        for run in self._all(
            "flow_runs", sort="START_TIME_DESC", flow_runs={"state": {"type": {"any_": ["COMPLETED"]}}}
        ):
            newest.setdefault(flows[run["flow_id"]], run["id"])
        for name in RUNS:
            if name in newest:
                yield "run" if name == RUNS[0] else f"run-{name}", f"/runs/flow-run/{newest[name]}"
        yield "artifacts", "/artifacts"
        for artifact in self._all("artifacts/latest", sort="UPDATED_DESC"):
            key = artifact["key"] or ""
            if artifact["type"] in ("markdown", "table") and key.startswith(ARTIFACTS):
                yield f"artifact-{key}", f"/artifacts/artifact/{artifact['latest_id']}"


def save(page: Page, target: Path) -> None:
    """Keep a picture of what the window shows, with as many colours as fit into LARGEST bytes."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    for colours in (256, 128, 64, 32, 16):
        picture.quantize(colours).save(target, optimize=True)
        if target.stat().st_size < LARGEST:
            break
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


def main() -> int:
    """Take every picture that there is something to show for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--api", help="the Prefect API, e.g. http://127.0.0.1:4200/api")
    parser.add_argument("--to", type=Path, default=Path("docs/images"), help="folder of the pictures")
    parser.add_argument("--page", action="append", default=[], help="NAME=FILE: an HTML file to show, such as a report")
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    files = dict(named.split("=", 1) for named in options.page)
    with open_browser(1280, 860) as page:
        for name, file in files.items():
            page.goto(Path(file).absolute().as_uri())
            save(page, options.to / f"{name}.png")
        if not options.api:
            return 0
        pages = dict(Server(options.api).pages())
        ui = PrefectUi(page, options.api.removesuffix("/api"))
        for name, path in pages.items():
            ui.open(path)
            page.wait_for_timeout(2500)  # the graph of a run and the charts draw themselves slowly
            save(page, options.to / f"{name}.png")
    missing = [name for name in (*ARTIFACTS, *RUNS) if not any(name in page for page in pages)]
    print(f"nothing to show of: {', '.join(missing) or 'nothing, all is there'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
