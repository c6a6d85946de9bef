"""Which chat template counts. Standard library only: the vLLM image takes this file alone, and serve.sh runs it.

choose_template.py FOLDER...      prints the file with the template of the first folder that has one; else nothing
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable

JINJA, CONFIG = "chat_template.jinja", "tokenizer_config.json"


def choose(folders: Iterable[str], read: Callable[[str, str], str | None]) -> tuple[str, str, str] | None:
    """Return folder, file and text of the chat template that counts, or None.

    The first folder that has one wins, so the adapter's comes before the base model's; in a folder
    `chat_template.jinja` comes before the entry in `tokenizer_config.json`, as in transformers.

    Args:
        folders: of models or adapters, in the order of their say.
        read: returns the text of a file of a folder, None where it is absent.
    """
    for folder in folders:
        if text := read(folder, JINJA):
            return folder, JINJA, text
        found = json.loads(read(folder, CONFIG) or "{}").get("chat_template")
        if isinstance(found, list):  # several by name
            found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str) and found:
            return folder, CONFIG, found
    return None


def _read(folder: str, name: str) -> str | None:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        return file.read()


def template_file(folders: Iterable[str]) -> str | None:
    """Return the file for `vllm serve --chat-template`, or None; one is written where the template is an entry."""
    chosen = choose(filter(None, folders), _read)
    if chosen is None:
        return None
    folder, name, text = chosen
    if name == JINJA:
        return os.path.join(folder, name)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".jinja", delete=False) as file:
        file.write(text)
    return file.name


if __name__ == "__main__":
    print(template_file(sys.argv[1:]) or "")
