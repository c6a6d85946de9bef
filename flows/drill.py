"""The preemption drill, `python -m flows.drill`: does a training that is preempted often come out the same?"""

import argparse
import asyncio
import sys

from prefect import flow
from pydantic import ValidationError

from tasks.config import DrillConfig, Location
from tasks.demo.local import Places, prefect_api
from tasks.drill.preemption import choose_target
from tasks.drill.training import DrillResult, make_order, report_drill, train_in_peace, train_in_the_storm
from tasks.errors import PreflowError


@flow(name="preemption-drill", flow_run_name="{drill.preemptions} preemptions")
async def preemption_drill(workspace: Location, drill: DrillConfig) -> DrillResult:
    """Train once in peace and once under preemption, and compare.

    Args:
        workspace: Where everything is kept, below drill/: a folder or gs://.
        drill: How often it is preempted, and where it trains.
    """
    target = await choose_target(drill)
    order = await make_order(workspace, drill)
    calm = await train_in_peace(order, target)
    preemptions, stormy = await train_in_the_storm(order, target, drill)
    result = DrillResult(preemptions=preemptions, calm=calm, stormy=stormy, price_per_hour=drill.price_per_hour)
    await report_drill(result)
    return result


def main() -> int:
    """Preempt a training again and again; the exit code is 1 if anything came out different."""
    parser = argparse.ArgumentParser(prog="python -m flows.drill", description=main.__doc__)
    parser.add_argument("--workspace", default=".drill", help="where everything is kept (default: .drill)")
    for name, field in DrillConfig.model_fields.items():
        flag, text = f"--{name.replace('_', '-')}", f"{field.description} (default: {field.default})"
        parser.add_argument(flag, default=field.default, help=text.replace("%", "%%"))
    options = vars(parser.parse_args())
    workspace = options.pop("workspace")
    try:
        drill = DrillConfig.model_validate(options)
        with prefect_api(Places.below(".drill")):
            return 0 if asyncio.run(preemption_drill(workspace, drill)).is_exact else 1
    except (PreflowError, ValidationError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
