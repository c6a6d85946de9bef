"""Generation and judging against a bare loop and against gathered batches, on one fake endpoint with real latencies.

    python -m tests.benchmarks.bench_generation --prompts prompts.jsonl
    python -m tests.benchmarks.bench_generation --windows 32 256 1024 --waves 40
    python -m tests.benchmarks.bench_generation --scale 100000

The first prints throughput, client CPU and the cached replay; the second throughput and CPU against a raw aiohttp loop,
the true limit, at several numbers of requests in flight; the third CPU and memory as the prompts grow. Each contender
runs in a process of its own, one after the other, against the same endpoint. A whole run has a start and an end that do
not grow with the prompts; between the first and the last answer is what a longer run would have more of.
"""

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

import aiohttp
import openai
import psutil

from tests.fakes import FakeOpenAI
from tests.fakes.models import sample

# Seconds and CPU seconds of this process when its first and its latest answer came, and how many have come.
ANSWERS: dict[str, Any] = {"count": 0}
# Of those that are kept, memory is noted at so many answers.
MEMORY_AT = (1_000, 10_000, 50_000, 100_000)
COMPLETIONS, MAX_TOKENS, SEED = 3, 256, 42
SAMPLING: dict[str, Any] = {"temperature": 0.9, "max_tokens": MAX_TOKENS, "frequency_penalty": 0.5}
Row = dict[str, Any]


def note_answer() -> None:
    """Note that an answer has come."""
    ANSWERS["count"] += 1
    ANSWERS["last"] = time.monotonic(), time.process_time()
    ANSWERS.setdefault("first", ANSWERS["last"])
    if ANSWERS["count"] in MEMORY_AT:
        ANSWERS[f"rss_mb {ANSWERS['count']}"] = psutil.Process().memory_info().rss / 2**20


# ---- the contenders: each runs in its own process and prints one JSON line


async def bare_loop(order: Row, prompts: TextIO, out: TextIO) -> None:
    """What anyone would write first: one client, a semaphore, rows written as they come. Killed, it begins again."""
    client = openai.AsyncOpenAI(base_url=order["endpoint"], api_key="none", max_retries=0)
    pending: set[asyncio.Task[None]] = set()
    window = asyncio.Semaphore(order["concurrency"])

    async def one(row: Row) -> None:
        try:
            async with window:
                answer = await client.chat.completions.create(
                    model="sampler", messages=row["prompt"], n=COMPLETIONS, seed=SEED, **SAMPLING
                )
        except openai.APIConnectionError as error:  # with many in flight its transport cannot connect in time
            print(f"a row is lost: {error}", file=sys.stderr)
            return
        note_answer()
        texts = [choice.message.content for choice in answer.choices]
        out.write(json.dumps({**row, "completions": texts}) + "\n")

    for line in prompts:
        # So that its memory is the loop's and not the file's.
        if len(pending) >= 4 * order["concurrency"]:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.gather(*done)
        pending.add(asyncio.create_task(one(json.loads(line))))
    await asyncio.gather(*pending)


async def raw_loop(order: Row, prompts: TextIO, out: TextIO) -> None:
    """The least that can be done: aiohttp, a semaphore, and rows written as they come."""
    window, url = asyncio.Semaphore(order["concurrency"]), f"{order['endpoint']}/chat/completions"
    connector = aiohttp.TCPConnector(limit=order["concurrency"])
    async with aiohttp.ClientSession(connector=connector) as session:

        async def one(row: Row) -> None:
            body = {"model": "sampler", "messages": row["prompt"], "n": COMPLETIONS, "seed": SEED, **SAMPLING}
            async with window, session.post(url, json=body) as response:
                answer = json.loads(await response.read())
            note_answer()
            texts = [choice["message"]["content"] for choice in answer["choices"]]
            out.write(json.dumps({**row, "completions": texts}) + "\n")

        await asyncio.gather(*(one(json.loads(line)) for line in prompts))


async def gathered_batches(order: Row, prompts: TextIO, out: TextIO) -> None:
    """Batches of 8 prompts that wait for their slowest, one request for each completion."""
    rows = [json.loads(line) for line in prompts]
    client = openai.AsyncOpenAI(base_url=order["endpoint"], api_key="none", max_retries=0)
    for start in range(0, len(rows), 8):
        batch = rows[start : start + 8]
        requests = [
            client.chat.completions.create(model="sampler", messages=row["prompt"], seed=SEED + i, **SAMPLING)
            for row in batch
            for i in range(COMPLETIONS)
        ]
        answers = await asyncio.gather(*requests)
        for number, row in enumerate(batch):
            of_row = answers[number * COMPLETIONS : (number + 1) * COMPLETIONS]
            out.write(json.dumps({**row, "completions": [a.choices[0].message.content for a in of_row]}) + "\n")


async def preflow_stage(order: Row, prompts: TextIO, out: TextIO) -> None:
    """The stages as they are: Prefect flows, shards, journals, cache records, manifests; judging in two orders."""
    from flows.generate import generate_completions
    from flows.judge import judge_preferences
    from tasks.config import GenerationConfig, JudgingConfig
    from tasks.llm import client

    read_answer = client.read_answer

    def read(body: bytes, prompt_bytes: int) -> Any:
        note_answer()
        return read_answer(body, prompt_bytes)

    client.read_answer = read
    common: Row = {"endpoint": order["endpoint"], "max_concurrency": order["concurrency"]}
    generation = GenerationConfig(model="sampler", num_completions=COMPLETIONS, **common)
    completions = await generate_completions(order["prompts"], order["workspace"], generation)
    if order["who"] == "preflow-judging":  # the completions are known by then
        judging = JudgingConfig(model="judge-hash", api_key=None, rubric="demo", **common)
        await judge_preferences(completions, order["workspace"], judging)


CONTENDERS = {
    "raw": raw_loop,
    "bare": bare_loop,
    "batches": gathered_batches,
    "preflow": preflow_stage,
    "preflow-judging": preflow_stage,
}


def waited() -> float:
    """Return the seconds for which the event loop was ready to run and had no CPU: what others took away."""
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


def contend(order: Row) -> None:
    """Run one contender and print what it took; its imports are made before the clock starts."""
    if order["who"].startswith("preflow"):
        import flows.generate
        import flows.judge  # noqa: F401
    before, waited_before, start = resource.getrusage(resource.RUSAGE_SELF), waited(), time.monotonic()
    with open(order["prompts"]) as prompts, open(order["out"], "w") as out:
        asyncio.run(CONTENDERS[order["who"]](order, prompts, out))
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {"seconds": time.monotonic() - start, "cpu": cpu, "rss_mb": after.ru_maxrss / 1024, **ANSWERS}
    found["waited"] = waited() - waited_before
    if ANSWERS["count"] > 1:
        seconds, cpu = (last - first for first, last in zip(ANSWERS["first"], ANSWERS["last"], strict=True))
        found |= {"rate": (ANSWERS["count"] - 1) / seconds, "cpu_ms": 1000 * cpu / (ANSWERS["count"] - 1)}
    print(json.dumps(found), flush=True)


def run(who: str, **order: Any) -> Row:
    """Run one contender in a process of its own."""
    contender = ["-m", "tests.benchmarks.bench_generation", "--contend", json.dumps({"who": who, **order})]
    command = [sys.executable, *contender]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{who} failed:\n{done.stderr[-3000:]}")
    result: Row = json.loads(done.stdout.splitlines()[-1])
    return result


# ---- what is measured

NAMES = {
    "bare": "a bare asyncio + openai loop",
    "batches": "gathered batches of 8, one request a completion",
    "preflow": "preflow",
    "replay": "preflow, all known",
    "judging": "preflow, judging in 2 orders",
    "judging replay": "preflow, judging, all known",
}
SIGMA = 0.5


def synthetic_prompts(path: Path, count: int) -> Path:
    """Write `count` prompts of the size of a short scene."""
    with path.open("w") as file:
        for number in range(count):
            content = f"Scene {number}.\n" + "\n".join(sample("bench", 7 * number + i, None) for i in range(3))
            messages = [{"role": "system", "content": "You go on with scenes."}, {"role": "user", "content": content}]
            file.write(json.dumps({"prompt": messages}) + "\n")
    return path


def compare(prompts: Path, folder: Path, options: argparse.Namespace) -> None:
    """Print throughput and CPU of all contenders on the same prompts, in turns."""
    plan = {"latency_ms": options.latency_ms, "latency_sigma": SIGMA}
    results: dict[str, list[Row]] = {"bare": [], "preflow": []}
    with FakeOpenAI(plan, folder / "fake") as fake:
        common: Row = {"endpoint": fake.url, "prompts": str(prompts), "concurrency": options.concurrency}
        common["out"] = str(folder / "out")
        for number in range(options.rounds):
            for who, runs in results.items():
                runs.append(run(who, **common, workspace=str(folder / f"ws{number}")))
        results["batches"] = [run("batches", **common)]
        known: Row = {**common, "workspace": str(folder / "ws0")}
        results["replay"] = [run("preflow", **known)]
        results["judging"] = [run("preflow-judging", **known)]
        results["judging replay"] = [run("preflow-judging", **known)]
    report(results, sum(1 for _ in prompts.open()), options)


def report(results: dict[str, list[Row]], count: int, options: argparse.Namespace) -> None:
    """Print the table."""
    print(
        f"{count:,} prompts x {COMPLETIONS} completions, {options.concurrency} requests in flight, log-normal latency "
        f"(median {options.latency_ms:g} ms, sigma {SIGMA:g}), median of {options.rounds} rounds\n"
    )
    print("| way | seconds | prompts/s | against the bare loop | client CPU, ms a prompt |")
    print("| --- | ---: | ---: | ---: | ---: |")
    base = median(results["bare"], "seconds")
    for who, name in NAMES.items():
        seconds, cpu = median(results[who], "seconds"), median(results[who], "cpu")
        ratio = f"{base / seconds:.3f}" if who in ("bare", "preflow", "batches") else ""
        print(f"| {name} | {seconds:.1f} | {count / seconds:.1f} | {ratio} | {1000 * cpu / count:.2f} |")


def median(runs: list[Row], name: str) -> float:
    return statistics.median(float(row[name]) for row in runs)


def windows(sizes: list[int], folder: Path, options: argparse.Namespace) -> None:
    """Print throughput and CPU against the raw loop at several numbers of requests in flight."""
    print("| in flight | prompts | way | seconds | ratio | CPU | no CPU | rate between answers | ratio | CPU |")
    print("| ---: | ---: | --- |" + " ---: |" * 7)
    for size in sizes:
        count = options.waves * size
        prompts = synthetic_prompts(folder / f"prompts-{size}.jsonl", count)
        plan = {"latency_ms": options.latency_ms, "latency_sigma": SIGMA}
        with FakeOpenAI(plan, folder / f"fake-{size}") as fake:
            order: Row = {"endpoint": fake.url, "prompts": str(prompts), "concurrency": size}
            order["out"] = str(folder / "out")
            raw: Row = {}
            for who in options.ways:
                runs = [run(who, **order, workspace=str(folder / f"ws-{size}-{n}")) for n in range(options.rounds)]
                found = {name: median(runs, name) for name in ("seconds", "cpu", "rate", "cpu_ms", "waited")}
                raw = raw or found
                whole = f"{found['seconds']:.1f} | {raw['seconds'] / found['seconds']:.3f}"
                between = f"{found['rate']:.1f} | {found['rate'] / raw['rate']:.3f} | {found['cpu_ms']:.2f}"
                cpu = 1000 * found["cpu"] / count
                cells = f"{size:,} | {count:,} | {who} | {whole} | {cpu:.2f} | {found['waited']:.1f} s | {between}"
                print(f"| {cells} |", flush=True)


def scale(sizes: list[int], folder: Path, options: argparse.Namespace) -> None:
    """Print memory and client CPU as the prompts grow."""
    at = "".join(f" at {count:,} |" for count in MEMORY_AT)
    print(
        f"| prompts | way | seconds | CPU, ms a prompt | peak RSS, MB |{at}\n" + "| ---: " * (5 + len(MEMORY_AT)) + "|"
    )
    for size in sizes:
        prompts = synthetic_prompts(folder / f"prompts-{size}.jsonl", size)
        with FakeOpenAI({"latency_ms": options.latency_ms}, folder / f"fake-{size}") as fake:
            for who in options.ways:
                order: Row = {"endpoint": fake.url, "prompts": str(prompts), "concurrency": options.concurrency}
                found = run(who, **order, out=str(folder / "out"), workspace=str(folder / f"scale-{size}"))
                memory = (found.get(f"rss_mb {count}") for count in MEMORY_AT)
                cells = "".join(f" {mb:.0f} |" if mb else " |" for mb in memory)
                cpu, peak = 1000 * found["cpu"] / size, found["rss_mb"]
                print(f"| {size:,} | {who} | {found['seconds']:.0f} | {cpu:.2f} | {peak:.0f} |{cells}", flush=True)


def main() -> None:
    """Start a Prefect server and measure."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_generation", description=__doc__)
    parser.add_argument("--prompts", type=Path, help="JSONL of prompts; without it 1,021 synthetic ones")
    parser.add_argument("--scale", type=int, help="measure memory and CPU at 1,000 and at this many synthetic prompts")
    parser.add_argument("--windows", type=int, nargs="+", help="compare with a raw aiohttp loop at these windows")
    parser.add_argument("--waves", type=int, default=40, help="prompts for each place in a window")
    parser.add_argument(
        "--ways", nargs="+", choices=CONTENDERS, help="of --windows and --scale, the first is the limit"
    )
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--latency-ms", type=float, help="median; default 1500, with --scale 20")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contend", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        contend(options.contend)
        return
    from tasks.demo.services import prefect_server

    with tempfile.TemporaryDirectory(prefix="bench-generation-") as scratch:
        folder = Path(scratch)
        (folder / "prefect").mkdir()
        with prefect_server(folder / "prefect") as server:
            os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{server.port}/api"
            os.environ["PREFECT_HOME"] = str(folder / "prefect")
            options.ways = options.ways or (["bare", "preflow"] if options.scale else ["raw", "bare", "preflow"])
            options.latency_ms = options.latency_ms or (20 if options.scale else 1500)
            if options.windows:
                windows(options.windows, folder, options)
            elif options.scale:
                scale([1000, options.scale], folder, options)
            else:
                compare(options.prompts or synthetic_prompts(folder / "p.jsonl", 1021), folder, options)


if __name__ == "__main__":
    main()
