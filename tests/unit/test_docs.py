"""The documentation: the site builds without a dead link, and what is made by scripts is up to date."""

import re
import subprocess
import sys
from pathlib import Path

from preflow.cli import COMMANDS
from tests.benchmarks import draw_architecture
from tests.fakes.process import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_site_builds_and_no_link_is_dead(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "preflow check" in page
    assert not re.search(
        r'(?:src|href)="https?://(?!github\.com|127\.0\.0\.1|squidfunk)[^"]*\.(?:js|css|woff2?)"', page
    )


def test_the_picture_of_the_architecture_is_that_of_the_code() -> None:
    assert draw_architecture.draw() in draw_architecture.PAGE.read_text(encoding="utf-8"), (
        "run: python -m tests.benchmarks.draw_architecture"
    )


def test_the_configuration_in_the_readme_is_what_init_writes() -> None:
    written = (ROOT / "preflow" / "config.yaml").read_text(encoding="utf-8")
    shown = README.partition("<!-- config -->\n```yaml\n")[2].partition("```\n<!-- /config -->")[0]
    assert shown == written, "run: python -m tests.benchmarks.walk --config-only"


def test_every_command_that_is_named_exists() -> None:
    texts = [README, *(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))]
    named = {name for text in texts for name in re.findall(r"(?:^    (?:\d  )?|`)preflow ([a-z]+)", text, re.MULTILINE)}
    assert named <= set(COMMANDS), named - set(COMMANDS)
    assert {"init", "check", "run", "report", "chat"} <= named
