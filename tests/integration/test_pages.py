"""Every page that preflow shows, on a wide window and on a phone: nothing is cut off, overlaps, or scrolls sideways.

The pages are made of the hardest texts there are (tests/fakes/pages.py), nothing runs. Pictures of them are kept where
something is wrong, and of all of them where PREFLOW_TEST_PICTURES names a folder.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, ViewportSize, expect
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate

from tasks.report.page import ReportSection
from tasks.report.render import render_html, render_markdown
from tests.browser import PrefectUi, look, open_browser
from tests.fakes.pages import LONG, all_pages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with open_browser() as page:
        yield page


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[ReportSection]]:
    return all_pages(tmp_path_factory.mktemp("rounds"))


@pytest.mark.parametrize("name", ["run", "approval", "sweep", "rounds", "training-live"])
def test_a_page_of_ours(name: str, pages: dict[str, list[ReportSection]], page: Page, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(render_html(f"preflow: {name}, {LONG[:70]}", pages[name]))
    page.goto((tmp_path / "page.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    look(page, name)


def test_a_page_in_the_prefect_ui(prefect_server: str, pages: dict[str, list[ReportSection]], page: Page) -> None:
    """Within what Prefect gives the text of an artifact. On a phone its tables do not wrap: report.html is for that."""
    sections = {section.title: section for section in (*pages["run"], *pages["sweep"], *pages["approval"])}
    ui, shown = PrefectUi(page, prefect_server.removesuffix("/api")), dict[str, Any]()
    with get_client(sync_client=True) as client:
        for title, section in sections.items():
            made = ArtifactCreate(key="page", type="markdown", data=render_markdown(section), description=title)
            shown[title] = client.create_artifact(made).id
    for title, artifact in shown.items():
        page.set_viewport_size(ViewportSize(width=1400, height=900))
        ui.open(f"/artifacts/artifact/{artifact}")
        expect(page.get_by_role("tabpanel").get_by_role("heading").first).to_be_visible()
        look(page, f"artifact-{title.lower().replace(' ', '-')}", "[role=tabpanel]", ("pre", "pre, table"))
