"""distilabel's generation and UltraFeedback-style judging against preflow's stages, on the same fake endpoint.

distilabel wants an environment of its own (`pip install 'distilabel[openai]' requests`; 1.5.3 does not declare the
latter):

    python -m tests.benchmarks.bench_distilabel --distilabel-python VENV/bin/python --prompts FILE [--limit 128]

Both sides run one after the other, with at most 32 requests in flight and a log-normal latency (median 1.5 s), and do
the same work: one request for a prompt's three completions, one to judge them. preflow's default of two orders would be
half as many requests again.
"""

import argparse
import asyncio
import json
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.fakes import FakeOpenAI

WINDOW = 32
DISTILABEL = """
import json, sys, time
from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts, GroupColumns
from distilabel.steps.tasks import TextGeneration, UltraFeedback
url, prompts, window = sys.argv[1], [json.loads(l) for l in open(sys.argv[2])], int(sys.argv[3])
rows = [{"instruction": "\\n".join(m["content"] for m in p["prompt"])} for p in prompts]
def llm(name): return OpenAILLM(model=name, base_url=url, api_key="none", generation_kwargs={"max_new_tokens": 256})
with Pipeline(name="bench") as pipeline:
    load = LoadDataFromDicts(data=rows, batch_size=window)
    write = TextGeneration(llm=llm("sampler"), num_generations=3, input_batch_size=window, group_generations=True)
    rate = UltraFeedback(llm=llm("sampler"), aspect="overall-rating", input_batch_size=window,
                         input_mappings={"generations": "generation"})
    load >> write >> rate
if __name__ == "__main__":
    start = time.monotonic()
    made = pipeline.run(use_cache=False)
    rows = len(made["default"]["train"])
    print(json.dumps({"seconds": time.monotonic() - start, "rows": rows}))
"""


async def run_preflow(url: str, prompts: Path, workspace: Path) -> dict[str, Any]:
    """Run preflow's two stages and return seconds and rows."""
    from flows.generate import generate_completions
    from flows.judge import judge_preferences
    from tasks.config import GenerationConfig, JudgingConfig

    start = time.monotonic()
    sampling = GenerationConfig(endpoint=url, model="sampler", max_concurrency=WINDOW)
    judging = JudgingConfig(
        endpoint=url, model="judge-hash", api_key=None, rubric="demo", max_concurrency=WINDOW, orders=1
    )
    completions = await generate_completions(str(prompts), str(workspace), sampling)
    await judge_preferences(completions, str(workspace), judging)
    return {"seconds": time.monotonic() - start, "rows": completions.rows}


def run_distilabel(python: str, url: str, prompts: Path) -> dict[str, Any]:
    """Run distilabel's pipeline in its own environment and return seconds and rows."""
    script = prompts.with_name("distilabel_pipeline.py")
    script.write_text(DISTILABEL)
    command = [python, str(script), url, str(prompts), str(WINDOW)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"distilabel failed:\n{done.stderr[-3000:]}")
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def main() -> None:
    """Run both and print a table."""
    from tasks.demo.api import prefect_api

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distilabel-python", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--limit", type=int, default=128)
    options = parser.parse_args()
    with TemporaryDirectory(prefix="bench-distilabel-") as scratch:
        prompts = Path(scratch, "prompts.jsonl")
        lines = Path(options.prompts).read_text().splitlines(keepends=True)[: options.limit]
        prompts.write_text("".join(lines))
        counts: dict[str, tuple[dict[str, Any], int]] = {}
        with FakeOpenAI({"latency_ms": 1500}) as fake:
            counts["distilabel"] = run_distilabel(options.distilabel_python, fake.url, prompts), len(fake.requests())
            with prefect_api(Path(scratch)):
                told = asyncio.run(run_preflow(fake.url, prompts, Path(scratch, "workspace")))
            counts["preflow"] = told, len(fake.requests()) - counts["distilabel"][1]
    print("| way | rows | requests | seconds | requests/s |\n| --- | ---: | ---: | ---: | ---: |")
    for name, (told, requests) in counts.items():
        seconds = told["seconds"]
        print(f"| {name} | {told['rows']} | {requests:,} | {seconds:.1f} | {requests / seconds:.1f} |")


if __name__ == "__main__":
    main()
