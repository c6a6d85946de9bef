"""`preflow params`."""

import json

from preflow.options import CONFIG, Changes, File, Switch


def params(
    file: File = CONFIG,
    /,
    *,
    sweep: Switch = False,
    changes: Changes = (),
) -> None:
    """Print a configuration as the parameters of dpo-pipeline, or of dpo-sweep.

    prefect deployment run dpo-pipeline/local --params "$(preflow params config.yaml)"

    Parameters
    ----------
    sweep
        For dpo-sweep: its `sweep` too.
    """
    from preflow.settings import load_settings

    print(json.dumps(load_settings(file, changes).parameters(sweep=sweep)))
