"""preflow's two GPU jobs on Modal, an L4 each, with a volume in place of the bucket; infra/README.md has the commands.

    train   the training child that a Kubernetes Job runs, from the same image
    serve   vLLM with the flags of infra/docker/serve.sh, behind a public address that asks for a key

The volume `preflow` is a workspace, mounted at /workspace; what Modal lacks of it is put there with `modal volume put`.
"""

import json
import os
import subprocess
from pathlib import Path

import modal

HERE = Path(__file__).resolve()
# In a container this file lies alone; what it builds images from matters only where it is deployed from.
ROOT = HERE.parents[2] if modal.is_local() else HERE.parent
DOCKER = ROOT / "infra" / "docker"
SERVE_SH = DOCKER / "serve.sh" if modal.is_local() else Path("/opt/preflow/serve.sh")
# serve.Dockerfile's.
SERVE_ENV = {
    "DO_NOT_TRACK": "1",
    "PYTHONPATH": "/opt/preflow/vllm_plugin",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
}
WORKSPACE, HUB = "/workspace", "/hub"
HOUR = 60 * 60
MODEL = os.environ.get("MODEL", "meta-llama/Llama-3.2-3B")

app = modal.App("preflow")
workspace_volume = modal.Volume.from_name("preflow", create_if_missing=True)
hub_volume = modal.Volume.from_name("preflow-hub", create_if_missing=True)
# HF_TOKEN and VLLM_API_KEY, both for both: without a key anybody who guesses the address may load adapters.
secret = modal.Secret.from_name("preflow", required_keys=["HF_TOKEN", "VLLM_API_KEY"])

train_image = modal.Image.from_dockerfile(DOCKER / "train.Dockerfile", context_dir=ROOT)
# Not serve.Dockerfile: an entrypoint on Modal must start the command that it is given.
serve_image = (
    modal.Image.from_registry("vllm/vllm-openai:v0.32.0", add_python="3.12")
    .entrypoint([])
    .env(SERVE_ENV)
    .add_local_dir(DOCKER, "/opt/preflow")
    .add_local_file(ROOT / "tasks/llm/choose_template.py", "/opt/preflow/choose_template.py")
)


@app.function(
    image=train_image,
    gpu="L4",
    cpu=4,
    memory=24 * 1024,
    volumes={WORKSPACE: workspace_volume, HUB: hub_volume},
    secrets=[secret],
    env={"HF_HOME": HUB},
    timeout=24 * HOUR,
    # Two containers do not see each other's writes, so not each other's lease either.
    max_containers=1,
    # For a container that is lost; a preemption does not count, Modal restarts the same input by itself.
    retries=modal.Retries(max_retries=3, initial_delay=10.0),
)
def train(preferences: str, training: str = "{}", workspace: str = WORKSPACE) -> str:
    """Train the SFT adapter with DPO, going on from the last checkpoint; return the adapter's reference as JSON.

    On a preemption Modal interrupts this call (SIGINT, then 30 s), the trainer saves, and the call is made again.

    Args:
        preferences: key of the pairs: the name of their folder in the workspace's `preferences`.
        training: fields of `TrainingConfig`, JSON; `sft_adapter` is the workspace's `adapters/sft` unless given.
        workspace: where the volume is mounted.

    Raises:
        PreflowError: an input is wrong, or an invariant of DPO does not hold.
    """
    from tasks.config import TrainingConfig
    from tasks.store.workspace import PreferencesRef
    from tasks.train.launch import check_training_inputs, run_training, training_key

    folder = Path(workspace, "preferences", preferences)
    artifact = json.loads((folder / "manifest.json").read_text())["artifact"]
    # The manifest names the file where it was made, which may be another machine.
    pairs = PreferencesRef.model_validate({**artifact, "uri": str(folder / "train.jsonl")})
    config = TrainingConfig.model_validate({"sft_adapter": f"{workspace}/adapters/sft", **json.loads(training)})
    check_training_inputs(config)
    key = training_key(pairs, config)
    adapter = run_training(pairs, workspace, config, key, lambda progress: print(progress.text(), flush=True))
    print(f"done: modal volume get preflow training/{key} workspace/training/", flush=True)
    return adapter.model_dump_json()


@app.function(
    image=serve_image,
    gpu="L4",
    volumes={WORKSPACE: workspace_volume, HUB: hub_volume},
    secrets=[secret],
    env={
        "HF_HOME": HUB,
        "MODEL": MODEL,
        "SFT_ADAPTER": f"{WORKSPACE}/adapters/sft",
        "ADAPTERS": f"{WORKSPACE}/adapters",
    },
    timeout=HOUR,
    scaledown_window=300,
    max_containers=1,
)
@modal.concurrent(max_inputs=256)
@modal.web_server(8000, startup_timeout=HOUR)
def serve() -> None:
    """Start vLLM; Modal passes requests to its port, and ends the container five minutes after the last one."""
    subprocess.Popen(["sh", SERVE_SH])
