"""DPO training."""

from prefect import flow

from tasks.config import Location, TrainingConfig
from tasks.report.run import publish, training_page
from tasks.run.inputs import PreferencesInput
from tasks.run.names import named
from tasks.run.versions import say_version_skew
from tasks.store.workspace import AdapterRef, Workspace
from tasks.train.task import train_adapter


@flow(name="train-dpo", flow_run_name=named("train with beta {training.beta}"), on_running=[say_version_skew])
async def train_dpo(preferences: PreferencesInput, workspace: Location, training: TrainingConfig) -> AdapterRef:
    """Train the SFT adapter further on preference pairs, going on where a preempted training was.

    Args:
        preferences: The pairs: their folder in the workspace, its manifest.json, or the reference itself.
        workspace: Where everything is kept: a folder or gs:// address.
        training: Models and DPO settings.
    """
    Workspace(workspace).check_writable()
    adapter = await train_adapter(preferences, workspace, training)
    await publish(training_page(adapter, workspace))
    return adapter
