"""A headless Chromium on the Prefect UI, as a person uses it: forms, runs, artifacts, pictures of what was seen."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import Locator, Page, ViewportSize, expect, sync_playwright

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
    # The V2 UI fetches a settings file of its analytics even where they are turned off. Nothing leaves this machine.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
# How long a page may take on a loaded machine, in milliseconds.
PATIENCE = 60_000
PICTURES = Path(os.environ.get("PREFLOW_TEST_PICTURES", Path(__file__).parent / "output"))

SIZES = (1400, 390)
# What is wider than the window or its own box, and which texts lie on each other, of all that is not folded.
FAULTS = """([root, scrolling]) => {
  const inside = [...document.querySelector(root).querySelectorAll('*')]
    .filter(e => e.checkVisibility() && (!scrolling || !e.closest(scrolling) && !e.querySelector(scrolling)));
  const width = document.documentElement.clientWidth;
  const name = e => `${e.tagName} ${e.className} "${(e.textContent || '').trim().slice(0, 40)}"`;
  const wide = inside.filter(e => e.getBoundingClientRect().right > width + 1)
    .map(e => `beyond the window: ${name(e)}`);
  const scrolls = inside.filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1)
    .map(e => `wider than its box: ${name(e)}`);
  const shown = (box, node) => {  // and not scrolled out of a box with a height of its own
    for (let e = node.parentElement; e; e = e.parentElement) {
      const around = e.getBoundingClientRect();
      const isOutside = box.top > around.bottom || box.bottom < around.top;
      if (isOutside && getComputedStyle(e).overflowY !== 'visible') return false;
    }
    return true;
  };
  const texts = [];
  const walker = document.createTreeWalker(document.querySelector(root), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    if (!walker.currentNode.textContent.trim() || !walker.currentNode.parentElement.checkVisibility()) continue;
    const range = document.createRange();
    range.selectNodeContents(walker.currentNode);
    for (const box of range.getClientRects())
      if (box.width > 1 && box.height > 1 && shown(box, walker.currentNode)) texts.push([box, walker.currentNode]);
  }
  texts.sort((a, b) => a[0].top - b[0].top);
  const on = [];
  for (let i = 0; i < texts.length; i++)
    for (let j = i + 1; j < texts.length && texts[j][0].top < texts[i][0].bottom - 4; j++) {
      const [a, b] = [texts[i][0], texts[j][0]];
      if (a.left < b.right - 2 && b.left < a.right - 2 && texts[i][1] !== texts[j][1])
        on.push(`on each other: ${[i, j].map(k => texts[k][1].textContent.slice(0, 40)).join(" and ")}`);
    }
  const page = document.documentElement.scrollWidth;
  return [...(page > width ? [`the page is ${page} wide`] : []), ...wide, ...scrolls, ...on].slice(0, 20);
}"""


def find_chromium() -> str:
    """Return where Chromium is.

    Raises:
        RuntimeError: nowhere; says how to install it.
    """
    found = os.environ.get("PREFLOW_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        raise RuntimeError("no Chromium: `apt-get install chromium`, or set PREFLOW_CHROMIUM to one")
    return found


@contextmanager
def open_browser(width: int = 1400, height: int = 1000) -> Iterator[Page]:
    """Open a page of a fresh browser with a profile of its own."""
    with TemporaryDirectory(prefix="chromium-") as profile, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=find_chromium(), args=list(FLAGS), viewport={"width": width, "height": height}
        )
        context.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        page = context.pages[0]
        yield page
        context.close()


class PrefectUi:
    """The Prefect UI at an address: the version that `/` leads to."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        page.goto(url)
        page.wait_for_url(re.compile(r"/dashboard"))
        self.root = page.url.partition("/dashboard")[0]

    def open(self, path: str) -> None:
        """Open a page of the UI by its address and wait until it has loaded."""
        self.page.goto(f"{self.root}{path}")
        self.page.wait_for_load_state("networkidle")

    def open_form(self, deployment: str) -> None:
        self.open(f"/deployments/deployment/{deployment}/run")
        expect(self.page.get_by_role("button", name="Submit")).to_be_visible()

    def submit(self) -> None:
        self.page.get_by_role("button", name="Submit").click()

    def answer(self, run: str, shown: str, yes: bool, note: str, picture: str) -> None:
        """Resume a run that waits for a person from its page, after a look at the form."""
        self.open(f"/runs/flow-run/{run}")
        self.wait_for_state("Suspended")
        self.choose("Resume")
        dialog = self.page.get_by_role("dialog")
        expect(dialog.get_by_text(shown)).to_be_visible()
        expect(dialog.get_by_role("link", name="Read the page first")).to_be_visible()
        if yes:
            dialog.get_by_role("switch").click()
        dialog.locator("textarea").fill(note)
        self.picture(picture, whole=False)
        self.press(dialog.get_by_role("button", name="Resume"), dialog)

    def picture(self, name: str, whole: bool = True) -> Path:
        PICTURES.mkdir(parents=True, exist_ok=True)
        target = PICTURES / f"{name}.png"
        self.page.screenshot(path=target, full_page=whole)
        return target

    def field(self, title: str, number: int = 0) -> Locator:
        """Return the entry of the form's field with a title (the UI adds "(Optional)"); `number` tells equals apart."""
        return self.page.get_by_label(re.compile(rf"^{re.escape(title)}( \(Optional\))?$")).nth(number)

    def press(self, button: Locator, form: Locator) -> None:
        """Press a button whose `form`, or dialog, goes away once that is done.

        On a busy machine a click is lost now and then, or the busy server refuses it, and a person presses again.
        The button tells nothing: while the server is asked it has another name.
        """
        for _ in range(5):
            button.click()
            try:
                expect(form).not_to_be_visible(timeout=20_000)
            except AssertionError:
                self.picture("pressed-again", whole=False)
            else:
                return
        raise AssertionError(f"{form} is still there after five times {button}; see pressed-again.png")

    def choose(self, entry: str) -> None:
        self.page.locator("main button[aria-haspopup=menu]").first.click()
        self.page.get_by_role("menuitem", name=entry, exact=True).click()

    def wait_for_state(self, state: str, seconds: float = 600) -> None:
        badge = self.page.get_by_text(state, exact=True).first
        expect(badge).to_be_visible(timeout=1000 * seconds)

    def pictures_shown(self) -> list[int]:
        """Return the widths of the markdown's pictures, as they were decoded; 0 for one that is broken."""
        found: list[int] = self.page.evaluate(
            "[...document.images].filter(i => i.src.startsWith('data:image/png')).map(i => i.naturalWidth)"
        )
        return found


def faults(page: Page, root: str = "body", scrolling: str = "") -> list[str]:
    """Return what of a page is wider than the window or lies on something else; what `scrolling` selects may scroll."""
    found: list[str] = page.evaluate(FAULTS, [root, scrolling])
    return found


def look(page: Page, name: str, root: str = "body", scrolling: tuple[str, str] = ("", "")) -> None:
    """Look at the page that is shown in both SIZES; with PREFLOW_TEST_PICTURES keep pictures of it, light and dark."""
    for width, may_scroll in zip(SIZES, scrolling, strict=True):
        page.set_viewport_size(ViewportSize(width=width, height=900))
        found = faults(page, root, may_scroll)
        for scheme in ("light", "dark") if found or "PREFLOW_TEST_PICTURES" in os.environ else ():
            PICTURES.mkdir(parents=True, exist_ok=True)
            page.emulate_media(color_scheme=scheme)
            page.screenshot(path=PICTURES / f"page-{name}-{width}-{scheme}.png", full_page=True)
        assert not found, f"{name} at {width}: {found}"
