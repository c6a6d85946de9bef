"""A run that waits without a process is not taken for a dead one."""

import yaml

from tasks.batch.leaving import STATE
from tests.fakes.process import ROOT


def test_a_run_that_has_left_is_not_taken_for_silent() -> None:
    made = yaml.safe_load((ROOT / "deployments" / "automations.yaml").read_text())["automations"]
    silent = [item["trigger"] for item in made if item["trigger"].get("after") == ["prefect.flow-run.heartbeat"]]
    assert len(silent) == 2
    assert all(f"prefect.flow-run.{STATE}" in trigger["expect"] for trigger in silent)
