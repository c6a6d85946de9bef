"""Labelling as a person does it: a browser on the page, by keys and by clicks, ended in the middle and gone on with."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from preflow.labelling import serve
from tasks.evaluate.labels import Labelling, labels_uri, read_labels, record_agreement
from tasks.store.workspace import EvaluationRef
from tests.browser import PICTURES, look, open_browser
from tests.fakes.evaluated import evaluated
from tests.fakes.pages import LONG, WORDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
PAIRS = 8


@pytest.fixture
def evaluation(tmp_path: Path) -> EvaluationRef:
    return evaluated(tmp_path, lambda identity: [1, 1], prompts=12)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with open_browser() as page:
        yield page


@contextmanager
def served(evaluation: EvaluationRef) -> Iterator[str]:
    """Serve the page in a thread; it must have ended by itself when the block ends."""
    address: list[str] = []
    ready = threading.Event()

    def started(where: str) -> None:
        address.append(where)
        ready.set()

    thread = threading.Thread(target=serve, args=(Labelling(evaluation, PAIRS), 0, started), daemon=True)
    thread.start()
    assert ready.wait(60)
    yield address[0]
    if not Labelling(evaluation, PAIRS).missing:
        thread.join(60)
        assert not thread.is_alive()


def idle(page: Page) -> None:
    """Wait until the page has its answer: what is pressed before that is not meant for the next pair."""
    expect(page.locator("body[aria-busy=true]")).to_have_count(0)


def judge(page: Page, done: int, key: str = "") -> None:
    """Wait for a pair and press a key; without one, that of the new adapter's side."""
    expect(page.locator("#count")).to_have_text(f"{done} of {PAIRS} judged")
    idle(page)
    page.keyboard.press(key or ("1" if "new" in page.locator("#left").inner_text() else "2"))


def test_a_person_judges_blind_stops_and_goes_on(evaluation: EvaluationRef, page: Page) -> None:
    with served(evaluation) as address:
        page.goto(address)
        for done in range(4):
            judge(page, done)
        expect(page.locator("#count")).to_have_text(f"4 of {PAIRS} judged")
        PICTURES.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=PICTURES / "labelling.png", full_page=True)
    assert page.locator("#prompt").inner_html().count("&lt;b&gt;bold&lt;/b&gt;") == 1, "a prompt is text, never markup"
    assert "labeller" not in page.content()
    with served(evaluation) as address:  # another process of the same command
        page.goto(address)
        for done in range(4, 6):
            judge(page, done)
        expect(page.locator("#count")).to_have_text(f"6 of {PAIRS} judged")
        idle(page)
        page.keyboard.press("Backspace")
        idle(page)
        page.locator("button[data-choice='0']").click()
        expect(page.locator("#count")).to_have_text(f"6 of {PAIRS} judged")
        judge(page, 6, "0")
        judge(page, 7, "1")
        expect(page.locator("#end")).to_contain_text("All judged")
    answers = read_labels(evaluation)
    assert len(answers) == PAIRS
    assert sorted(answers.values())[-5:] == [1.0] * 5
    assert list(answers.values()).count(0.5) == 2
    found = record_agreement(evaluation)
    assert found.labels == PAIRS


def test_a_key_that_is_held_judges_one_pair(evaluation: EvaluationRef, page: Page) -> None:
    with served(evaluation) as address:
        page.goto(address)
        expect(page.locator("#pair")).to_be_visible()
        page.keyboard.down("1")
        for _ in range(20):
            page.keyboard.down("1")  # as a keyboard repeats it
        page.keyboard.up("1")
        expect(page.locator("#count")).to_have_text(f"1 of {PAIRS} judged")
        assert len(read_labels(evaluation)) == 1


def test_another_site_can_neither_read_nor_answer(evaluation: EvaluationRef) -> None:
    with served(evaluation) as address, httpx.Client(base_url=address) as client:
        good: dict[str, Any] = {"number": 0, "choice": "1"}
        assert client.get("/pairs", headers={"Host": "evil.example"}).status_code == 400
        form = {"content": json.dumps(good), "headers": {"Content-Type": "text/plain"}}
        assert client.post("/answers", **form).status_code == 415
        for wrong in ({"number": 0, "choice": "3"}, {"number": 99, "choice": "1"}, {"number": -1, "choice": "1"}, {}):
            assert client.post("/answers", json=wrong).status_code in (404, 422), wrong
        assert client.get("/pairs/99").status_code == 404
        assert not Path(labels_uri(evaluation)).exists()
        assert set(client.get("/pairs").json()) == {"number", "done", "total", "prompt", "sides"}
        assert client.post("/answers", json=good).json()["number"] == 1


def test_the_page_fits_a_wide_window_and_a_phone_whatever_the_texts_are(evaluation: EvaluationRef, page: Page) -> None:
    with served(evaluation) as address:
        page.goto(address)
        expect(page.locator("#pair")).to_be_visible()
        for name, text in (("prompt", LONG + WORDS), ("left", LONG), ("right", WORDS)):
            page.locator(f"#{name}").evaluate("(place, text) => { place.textContent = text }", text)
        look(page, "label")
