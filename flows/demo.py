"""The whole pipeline on this machine, offline: `preflow demo`."""

from prefect import flow

from flows.pipeline import dpo_pipeline
from flows.sweep import dpo_sweep
from tasks.config import PipelineConfig, SweepConfig
from tasks.demo import DemoModel
from tasks.demo.local import model_servers
from tasks.demo.materials import make_materials
from tasks.demo.up import Places
from tasks.store.workspace import PipelineResult
from tasks.sweep.prepare import prepare_points
from tasks.sweep.ranking import find_sweep

BETAS = SweepConfig(grid={"training.beta": [0.03, 0.1, 0.3]})


@flow(name="demo")
async def demo(folder: str = ".demo", model: DemoModel = "tiny") -> tuple[PipelineConfig, PipelineResult]:
    """Make an SFT adapter of a small model, and take it to a better one through every stage of the pipeline."""
    places = Places.below(folder, model)
    materials = make_materials(places.root, model)
    with model_servers(places, materials) as config:
        return config, await dpo_pipeline(config)


@flow(name="demo-sweep")
async def demo_sweep(folder: str = ".demo") -> None:
    """Try three betas on the demo's model: one generation, one judging, three trainings, ranked by win rate."""
    places = Places.below(folder)
    materials = make_materials(places.root)
    with model_servers(places, materials, lambda config: find_sweep(prepare_points(config, BETAS).points)) as config:
        await dpo_sweep(config, BETAS)
