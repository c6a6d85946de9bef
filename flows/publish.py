"""Publishing what is served on the Hugging Face hub."""

from prefect import flow

from tasks.config import Location, PublishingConfig
from tasks.promote.publish import Publication, find_published, publish
from tasks.run.evidence import published_evidence
from tasks.run.names import named


@flow(name="publish-adapter", flow_run_name=named("publish {name} as {publishing.repo}"))
async def publish_adapter(workspace: Location, name: str, publishing: PublishingConfig) -> Publication:
    """Publish the adapter that is served under `name`, with a model card written from the manifests.

    Args:
        workspace: Where everything is kept: a folder or gs:// address.
        name: Name under which the adapter is served.
        publishing: The repository on the hub.
    """
    entry = find_published(workspace, name, publishing)
    return await publish(entry, workspace, publishing, published_evidence(entry, publishing))
