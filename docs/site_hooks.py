"""What the site takes besides docs/: README.md, infra/README.md and CONTRIBUTING.md, with their links fixed."""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "infra/README.md": "infra.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside of docs/."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at the pages of the site; a file that is no page becomes its path."""
    sources = {target: source for source, target in PAGES.items()}
    source = PurePosixPath(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def fixed(link: re.Match[str]) -> str:
        path = (ROOT / source.parent / link[1]).resolve()
        if not path.exists():
            return link[0]  # the build says that it leads nowhere
        name = path.relative_to(ROOT).as_posix()
        if name in PAGES:
            return f"]({PAGES[name]}{link[2] or ''})"
        if name.startswith("docs/"):
            return f"]({name.removeprefix('docs/')}{link[2] or ''})"
        return f"](https://github.com/preflow/preflow/blob/main/{name})"

    return LINK.sub(fixed, markdown)
