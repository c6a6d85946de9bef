"""`preflow schema`."""

import json


def schema() -> None:
    """Print the JSON schema of config.yaml: every setting with its meaning, unit, bounds and default."""
    from preflow.settings import RunFile

    print(json.dumps(RunFile.model_json_schema(), indent=1))
