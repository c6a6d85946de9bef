"""Sampling of completions."""

from prefect import flow

from tasks.config import GenerationConfig, Location
from tasks.generate.sampling import collect_completions, plan_generation
from tasks.run.names import named
from tasks.store.prompts import import_prompts
from tasks.store.workspace import CompletionsRef, Workspace


@flow(name="generate-completions", flow_run_name=named("sample {generation.model}"))
async def generate_completions(prompts: Location, workspace: Location, generation: GenerationConfig) -> CompletionsRef:
    """Sample N completions for every prompt of a JSONL file.

    Args:
        prompts: Prompts (or SFT rows), JSONL: a path or gs:// address.
        workspace: Where everything is kept: a folder or gs:// address.
        generation: Endpoint and sampling settings.
    """
    Workspace(workspace).check_writable()
    source = import_prompts(prompts, workspace)
    plan = plan_generation(source, workspace, generation)
    return await collect_completions(plan)
