"""The whole pipeline on this machine, offline: `make demo`."""

import argparse
import asyncio
import sys
from uuid import UUID

from prefect import flow
from prefect.runtime import flow_run

from flows.pipeline import dpo_pipeline
from flows.sweep import dpo_sweep
from tasks.config import SweepConfig
from tasks.demo.local import Places, announce, model_servers, prefect_api, show_result
from tasks.demo.materials import make_materials
from tasks.errors import PreflowError
from tasks.store.workspace import PipelineResult
from tasks.sweep.prepare import prepare_points
from tasks.sweep.ranking import find_sweep

BETAS = SweepConfig(grid={"training.beta": [0.03, 0.1, 0.3]})


@flow(name="demo")
async def demo(folder: str = ".demo") -> PipelineResult:
    """Make a tiny SFT adapter, and take it to a better one through every stage of the pipeline."""
    places = Places.below(folder)
    materials = make_materials(places.root)
    with model_servers(places, materials) as config:
        result = await dpo_pipeline(config)
    await show_result(result, config, UUID(flow_run.get_id()))
    return result


@flow(name="demo-sweep")
async def demo_sweep(folder: str = ".demo") -> None:
    """Try three betas on the demo's model: one generation, one judging, three trainings, ranked by win rate."""
    places = Places.below(folder)
    materials = make_materials(places.root)
    with model_servers(places, materials, lambda config: find_sweep(prepare_points(config, BETAS).points)) as config:
        await dpo_sweep(config, BETAS)


def main() -> int:
    """Run the demo or, with --sweep, its sweep; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.demo", description=main.__doc__)
    parser.add_argument("--folder", default=".demo", help="where everything is kept (default: .demo)")
    parser.add_argument("--sweep", action="store_true", help="try three betas against each other")
    options = parser.parse_args()
    places = Places.below(options.folder)
    try:
        with prefect_api(places) as ui:
            announce(places, ui)
            if options.sweep:
                asyncio.run(demo_sweep(options.folder))
                return 0
            result = asyncio.run(demo(options.folder))
            return 0 if result.promotion is not None else 1
    except PreflowError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; run it again and it goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
