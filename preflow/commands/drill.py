"""`preflow drill`."""

import asyncio
from pathlib import Path

from preflow.options import Changes


def drill(
    *,
    workspace: str = ".drill",
    deployment: str | None = None,
    preemptions: int = 4,
    steps: int = 40,
    seed: int = 42,
    grace_seconds: float = 15.0,
    pairs: str | None = None,
    changes: Changes = (),
) -> int:
    """Preempt a training on purpose, here or on the cluster, and compare its bytes with those of one left alone.

    SIGTERM and SIGKILL in turn. On Kubernetes the first is an eviction, the second kills what runs in the container.

    Parameters
    ----------
    workspace
        Where everything is kept: a folder or gs:// address.
    deployment
        A deployment on a pool of type kubernetes, such as train-dpo/l4-spot; else a child process here.
    preemptions
        Times that it is preempted.
    steps
        Optimizer steps of the training.
    seed
        Seed of the steps at which it is preempted.
    grace_seconds
        Seconds from SIGTERM to SIGKILL; GKE spot gives 15.
    pairs
        Preference pairs, a train.jsonl; else a few, and a tiny model, are made.
    changes
        A setting of the training to change, such as base_model=NAME or sft_adapter=FOLDER.
    """
    import logging

    from preflow.settings import parse_change
    from tasks.demo.local import Places, prefect_api
    from tasks.drill.drill import Drill, run_drill

    logging.getLogger("tasks").setLevel(logging.INFO)
    training = dict(parse_change(change) for change in changes)
    order = Drill(workspace, deployment, preemptions, steps, seed, grace_seconds, pairs, training)
    with prefect_api(Places(Path(".drill").absolute())):
        result = asyncio.run(run_drill(order))
    print(f"\n{result.text()}", flush=True)
    return 0 if result.is_exact else 1
