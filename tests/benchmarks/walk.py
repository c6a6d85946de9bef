"""The walk of the README: its commands on 50 prompts, proven on 40 others; their output, wrapped, goes into README.md.

    preflow up; python -m tests.benchmarks.walk       --config-only: only the config.yaml that `init` writes

It takes the demo's vLLM and judge for a model of your own: other prompts than the demo's, a configuration made by
`preflow init`, and the edits that a person makes.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tasks.demo.corpus import heldout_prompts, training_prompts
from tasks.demo.local import JUDGE_KEY
from tasks.demo.materials import locate_materials
from tasks.demo.up import Up

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DEMO = ROOT / ".demo"
PROMPTS, HELD_OUT, SEED = 50, 40, 11


def edits() -> dict[str, str]:
    """Return the lines that a person changes, by their settings: the four marked ones, and what suits a tiny model."""
    materials = locate_materials(DEMO)
    return {
        "sft_adapter": str(materials.sft), "base_model": str(materials.base), "model: gemini-3.5-flash": "demo-judge",
        "api_key": f"env:{JUDGE_KEY}", "endpoint: https": "http://127.0.0.1:8001/v1", "max_tokens": "128",
        "beta": "0.1\n  load_in_4bit: false\n  bf16: false\n  learning_rate: 1e-3\n  max_steps: 30\n  warmup_steps: 5\n"
        "  max_length: 512",
    }  # fmt: skip


def edit(file: Path) -> None:
    """Change config.yaml as a person does."""
    text = file.read_text()
    for name, value in edits().items():
        key = name.split(":")[0]
        text = re.sub(rf"(?m)^(\s+){re.escape(name)}.*$", lambda m, k=key, v=value: f"{m[1]}{k}: {v}", text, count=1)
    file.write_text(text.replace("workspace: workspace ", "eval_prompts: held-out.jsonl\nworkspace: workspace "))


def walk(folder: Path) -> str:
    """Run the five commands and return what was typed and what came, as on a terminal."""
    for name, rows in (("prompts", training_prompts(PROMPTS, SEED)), ("held-out", heldout_prompts(HELD_OUT, SEED))):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    key = judge_key()
    said: list[str] = []
    for command in ("init", "check", "run", "report"):
        start = time.monotonic()
        said.append(f"$ preflow {command}\n{preflow(command, folder, key)}")
        print(said[-1], f"({time.monotonic() - start:.0f} s)", flush=True)
        if command == "init":
            edit(folder / "config.yaml")
    return "\n".join(said).replace(str(folder), "~/mine")


def preflow(command: str, folder: Path, key: str) -> str:
    """Run one command and return all that it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), JUDGE_KEY: key, "COLUMNS": "110"}
    environment["PREFECT_API_URL"] = "http://127.0.0.1:4200/api"
    done = subprocess.run(
        [sys.executable, "-m", "preflow", command], cwd=folder, env=environment, text=True, timeout=580,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.stdout.rstrip() + "\n"


def judge_key() -> str:
    """Return the key that `preflow up` has made for its judge."""
    processes = Up(DEMO).leftovers(naming="tasks.demo.judge")
    if not processes:
        sys.exit("nothing runs: preflow up")
    return str(processes[0].environ()[JUDGE_KEY])


def put(mark: str, text: str) -> None:
    """Replace what stands between two marks of the README."""
    readme = README.read_text(encoding="utf-8")
    before, _, rest = readme.partition(f"<!-- {mark} -->\n")
    README.write_text(f"{before}<!-- {mark} -->\n{text}{rest[rest.index(f'<!-- /{mark} -->') :]}", encoding="utf-8")


def main() -> None:
    """Write the README's parts."""
    put("config", f"```yaml\n{(ROOT / 'preflow' / 'config.yaml').read_text(encoding='utf-8')}```\n")
    if "--config-only" in sys.argv:
        return
    with TemporaryDirectory() as folder:
        start = time.monotonic()
        said = walk(Path(folder))
        seconds = time.monotonic() - start
    about = f"{PROMPTS} prompts and {HELD_OUT} held-out ones, the demo's model and judge, 2 busy cores: {seconds:.0f} s"
    lines = [textwrap.fill(line, 118, subsequent_indent="      ") for line in said.splitlines()]
    put("walk", f"What they print ({about}):\n\n```console\n" + "\n".join(lines) + "\n```\n")


if __name__ == "__main__":
    main()
