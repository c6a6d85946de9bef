"""Which pairs are best to train on: the settings that leave best and worst, each against them, on the demo's data.

    python -m tests.benchmarks.bench_pairs FOLDER [--seeds 42 43 44]

A sweep on the demo's model and prompts, with vLLM and the judge of rules; everything is kept in FOLDER, so that more
seeds cost only themselves. Prints the table of docs/judging.md. A point takes about two minutes of two cores.
"""

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from flows.sweep import dpo_sweep
from tasks.config import PipelineConfig, SweepConfig
from tasks.demo.api import prefect_api
from tasks.demo.local import model_servers
from tasks.demo.materials import ensure_materials, locate_materials
from tasks.demo.up import Places
from tasks.sweep.prepare import prepare_points
from tasks.sweep.ranking import PointResult, SweepResult, find_sweep

FEW, MANY = {"generation.num_completions": 4}, {"generation.num_completions": 16}
SETTINGS: dict[str, dict[str, Any]] = {
    "best and worst of 4": FEW,
    "the same, `min_chosen_score: 10`": {**FEW, "judging.min_chosen_score": 10},
    "best and worst of 16": MANY,
    "the same, `rejected_sigmas: 2`": {**MANY, "judging.rejected_sigmas": 2},
    "of 4, `min_confidence: 5` and `unsure_for_sft: true`": {
        **FEW,
        "judging.min_confidence": 5,
        "judging.unsure_for_sft": True,
    },
}


def sweep_of(seeds: Sequence[int]) -> SweepConfig:
    """Return each setting with each seed of the training."""
    return SweepConfig(changes=[{**change, "training.seed": seed} for seed in seeds for change in SETTINGS.values()])


def prepared(config: PipelineConfig) -> PipelineConfig:
    """Return the demo's configuration without the null test, which is the same for all."""
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"null_test": False})})


async def run(folder: Path, seeds: Sequence[int]) -> SweepResult:
    """Return the sweep's result, from where it was if it was run before."""
    places, sweep = Places.below(str(folder)), sweep_of(seeds)
    materials = locate_materials(places.root)
    ensure_materials(materials)

    def known(config: PipelineConfig) -> SweepResult | None:
        return find_sweep(prepare_points(prepared(config), sweep).points)

    with prefect_api(places.root), model_servers(places, materials, known) as config:
        result = await dpo_sweep(prepared(config), sweep)
    assert isinstance(result, SweepResult), result
    return result


def tell(name: str, points: Sequence[PointResult]) -> str:
    """Return one setting's row: its pairs, and the win rates over the SFT adapter."""
    rates = [point.rate.win_rate for point in points if point.rate]
    pairs = {point.made.preferences.rows for point in points if point.made and point.made.preferences}
    cells = [name, *map(str, pairs), *(f"{rate:.3f}" for rate in rates), f"{fmean(rates):.3f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run what is not known yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    arguments = parser.parse_args()
    result = asyncio.run(run(arguments.folder, arguments.seeds))
    print(f"| pairs | to train on | {' | '.join(f'seed {seed}' for seed in arguments.seeds)} | mean |")
    print(f"|---|---|{'---|' * (len(arguments.seeds) + 1)}")
    for place, name in enumerate(SETTINGS):
        print(tell(name, result.points[place :: len(SETTINGS)]))


if __name__ == "__main__":
    main()
