"""DPO training."""

from prefect import flow

from tasks.config import TrainingConfig
from tasks.report import report_training
from tasks.storage import AdapterRef, PreferencesRef, Workspace
from tasks.train import train_adapter


@flow(name="train-dpo", flow_run_name="train with beta {training.beta}")
async def train_dpo(preferences: PreferencesRef, workspace: str, training: TrainingConfig) -> AdapterRef:
    """Train the SFT adapter further on preference pairs, going on where a preempted training was."""
    Workspace(workspace).check_writable()
    adapter = await train_adapter(preferences, workspace, training)
    await report_training(adapter, workspace)
    return adapter
