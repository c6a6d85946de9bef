"""A whole prompts file through a real vLLM on CPU and a judge endpoint, to train.jsonl and val.jsonl.

    python -m tests.benchmarks.bench_real_input --prompts prompts.jsonl [--limit N] [--workspace FOLDER]

The model is the demo's (trained here if --materials names no folder that holds it), with room for longer prompts than
it was trained on: what it writes is of no use, but every part is real. The judge takes the longest for the best, behind
HTTP and with the fences and slips of real ones: the demo's own judge knows the demo's characters only, and finds all
else equally bad. Prints time, requests, tokens and peak memory, and checks that every prompt is there exactly once.
"""

import argparse
import asyncio
import json
import os
import resource
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fakes import FakeOpenAI

COMPLETIONS, MAX_TOKENS, CONCURRENCY = 3, 256, 16
CONTEXT = 1536
JUDGE = {"latency_ms": 20, "verdict_faults": {"fences": 0.5, "text_around": 0.1, "strings": 0.1, "same": 0.02}}


def make_model(materials: Path, scratch: Path) -> tuple[Path, Path]:
    """Return the demo's base model, as one with a context of CONTEXT tokens, and its SFT adapter."""
    base, sft = materials / "base", materials / "sft"
    if not sft.is_dir():
        from tasks.demo.materials import SEED
        from tasks.demo.model import build_base_model, build_sft_adapter

        build_base_model(base, SEED)
        build_sft_adapter(base, sft, SEED)
    longer = scratch / "base"
    shutil.copytree(base, longer)
    for name, field in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        settings = json.loads((longer / name).read_text())
        (longer / name).write_text(json.dumps({**settings, field: CONTEXT}))
    return longer, sft


def first_rows(prompts: Path, limit: int | None, folder: Path) -> Path:
    """Return the prompts file, or a copy of its first `limit` rows."""
    if limit is None:
        return prompts
    lines = prompts.read_text().splitlines(keepends=True)[:limit]
    (folder / "prompts.jsonl").write_text("".join(lines))
    return folder / "prompts.jsonl"


async def run_stages(prompts: str, workspace: str, vllm: str, judge: str, sft: str) -> dict[str, Any]:
    """Sample and judge, and return the seconds of both."""
    from flows.generate import generate_completions
    from flows.judge import judge_preferences
    from tasks.config import GenerationConfig, JudgingConfig

    start = time.monotonic()
    completions = await generate_completions(
        prompts,
        workspace,
        GenerationConfig(
            endpoint=vllm,
            model="sft",
            adapter=sft,
            num_completions=COMPLETIONS,
            max_tokens=MAX_TOKENS,
            max_concurrency=CONCURRENCY,
        ),
    )
    sampled = time.monotonic()
    judging = JudgingConfig(endpoint=judge, model="judge-length", api_key=None, rubric="demo")
    preferences = await judge_preferences(completions, workspace, judging)
    judged = time.monotonic()
    return {
        "completions": completions,
        "preferences": preferences,
        "seconds": {"sampling": sampled - start, "judging": judged - sampled},
    }


def check(prompts: Path, found: dict[str, Any]) -> Counter[str]:
    """Check that every prompt is judged or listed as failed, once, and every pair in one file, once."""
    from tasks.store.records import prompt_id

    def ids(path: Path) -> list[str]:
        return [json.loads(line)["id"] for line in path.open()]

    expected = {prompt_id(json.loads(line)["prompt"]) for line in prompts.open()}
    sampled, judged = Path(found["completions"].uri), Path(found["preferences"].uri).with_name("judged.jsonl")
    listed = ids(sampled) + ids(sampled.with_name("failures.jsonl"))
    if set(listed) != expected or len(listed) != len(expected):
        raise SystemExit(f"{len(expected)} prompts, but {len(listed)} completions and failures")
    if ids(judged) != ids(sampled):
        raise SystemExit("judged.jsonl does not hold the rows of completions.jsonl in their order")
    statuses = Counter(json.loads(line)["status"] for line in judged.open())
    pairs = ids(judged.with_name("train.jsonl")) + ids(judged.with_name("val.jsonl"))
    if len(set(pairs)) != len(pairs) or len(pairs) != statuses["pair"]:
        raise SystemExit(f"{statuses['pair']} pairs were judged, but train and val hold {len(pairs)}")
    return statuses


def report(found: dict[str, Any], statuses: Counter[str]) -> None:
    """Print the figures."""
    print("\n| | sampling | judging |\n| --- | ---: | ---: |")
    folders = [Path(found["completions"].uri).parent, *Path(found["completions"].uri).parents[2].glob("verdicts/*")]
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
    rows = {"seconds": [f"{seconds:,.0f}" for seconds in found["seconds"].values()]}
    for name in ("requests", "prompt_tokens", "completion_tokens"):
        rows[name.replace("_", " ")] = [f"{manifest['cost'][name]:,}" for manifest in manifests]
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")
    preferences = found["preferences"]
    print(f"\n{preferences.rows} pairs in train.jsonl, {preferences.val_rows} in val.jsonl; rows: {dict(statuses)}")
    print(f"completions: {manifests[0]['counts']}")
    print(f"peak memory of the flow's process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    print("every prompt is there exactly once")


def main() -> None:
    """Start the servers, run the stages and report."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_real_input", description=__doc__)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL of prompts")
    parser.add_argument("--limit", type=int, help="take the first N only")
    parser.add_argument("--workspace", type=Path, help="where to work; a run that was ended goes on there")
    parser.add_argument("--materials", type=Path, help="folder with the demo's base and sft; made there if missing")
    options = parser.parse_args()
    from tasks.demo.services import VllmOptions, prefect_server, vllm_server

    with tempfile.TemporaryDirectory(prefix="bench-real-input-") as scratch:
        folder = Path(scratch)
        (folder / "prefect").mkdir()
        prompts = first_rows(options.prompts, options.limit, folder)
        base, sft = make_model(options.materials or folder / "materials", folder)
        serving = VllmOptions(max_model_len=CONTEXT, max_num_seqs=CONCURRENCY * COMPLETIONS)
        vllm = vllm_server(Path(".venv-serve/bin/python").absolute(), base, folder / "vllm.log", {"sft": sft}, serving)
        judge = FakeOpenAI(JUDGE, folder / "judge")
        with prefect_server(folder / "prefect") as server, judge, vllm:
            os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{server.port}/api"
            os.environ["PREFECT_HOME"] = str(folder / "prefect")
            workspace = str(options.workspace or folder / "workspace")
            found = asyncio.run(run_stages(str(prompts), workspace, vllm.base_url, judge.url, str(sft)))
            report(found, check(prompts, found))


if __name__ == "__main__":
    main()
