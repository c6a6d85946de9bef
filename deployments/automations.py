"""Make the automations of automations.yaml on the Prefect server that PREFECT_API_URL names; called by register.sh.

An automation that exists gets the file's trigger and actions, and stays on or off as it is. The environment variable
PREFLOW_NOTIFY_BLOCK (type/name of a notification block, e.g. slack-webhook/team) says through what they notify.
"""

import os
import sys
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound

HERE = Path(__file__).parent
UNSET = (
    "\n\nOff: it has nobody to tell. Make a notification block (Blocks > Add, e.g. a Slack webhook), set "
    "PREFLOW_NOTIFY_BLOCK to its type/name (slack-webhook/NAME), and run deployments/register.sh again."
)


def find_block(client: SyncPrefectClient, name: str) -> str:
    """Return the id of the block `type/name`, or end with what to do."""
    kind, _, block = name.partition("/")
    try:
        return str(client.read_block_document_by_name(block, kind).id)
    except ObjectNotFound:
        sys.exit(f"PREFLOW_NOTIFY_BLOCK={name}: no such block; it is type/name, as `prefect block ls` shows them")


def load(path: Path, block: str | None) -> list[AutomationCore]:
    """Return the automations of a file, with `block` in their notifications; without one those are off."""
    items: list[dict[str, Any]] = yaml.safe_load(path.read_text())["automations"]
    for item in items:
        for place, action in enumerate(item["actions"]):
            if action["type"] == "notify" and block is None:
                item |= {"enabled": False, "description": item["description"] + UNSET}
                item["actions"][place] = {"type": "do-nothing"}
            elif action["type"] == "notify":
                action |= {"type": "send-notification", "block_document_id": block}
    return [AutomationCore.model_validate(item) for item in items]


def apply(client: SyncPrefectClient, wanted: AutomationCore) -> None:
    """Make an automation, or bring the one of its name up to date."""
    known = next(iter(client.read_automations_by_name(wanted.name)), None)
    if known is None:
        client.create_automation(wanted)
        return
    same_kind = [action.type for action in known.actions] == [action.type for action in wanted.actions]
    enabled = known.enabled if same_kind else wanted.enabled
    client.update_automation(known.id, wanted.model_copy(update={"enabled": enabled}))


def main() -> None:
    """Make or update every automation."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "automations.yaml"
    name = os.environ.get("PREFLOW_NOTIFY_BLOCK")
    with get_client(sync_client=True) as client:
        for automation in load(path, find_block(client, name) if name else None):
            apply(client, automation)
            print(f"automation {automation.name}")


if __name__ == "__main__":
    main()
