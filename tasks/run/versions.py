"""Says, when a run begins, that its image and the Prefect server are not of one version."""

import logging
from typing import Any

import prefect
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State

logger = logging.getLogger(__name__)


def say_version_skew(flow: object, flow_run: FlowRun, state: State[Any]) -> None:
    """Log a warning if this process has another Prefect than the server; for a flow's `on_running`."""
    with get_client(sync_client=True) as client:
        server = client.api_version()
    if server != prefect.__version__:
        logger.warning(
            "this run has Prefect %s and its server has %s: one may not know what the other says. Build all images "
            "from one commit and install them together; on Kubernetes also set `image` in the work pool's settings.",
            prefect.__version__, server,
        )  # fmt: skip
