"""Publishing the served adapter on the Hugging Face hub: its files, and a card that says how it was made."""

import json
import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
from pydantic import BaseModel

from tasks.config import PublishingConfig
from tasks.errors import PreflowError
from tasks.llm.secrets import resolve_secret
from tasks.promote.model_card import Provenance, base_name, write_card
from tasks.promote.pointer import Entry, read_promoted
from tasks.store.workspace import COMMITTED, Workspace

# An answer may be lost after the commit was made.
UNKNOWN = "an upload is a single commit: all of it is there, or nothing"
logger = logging.getLogger(__name__)


class Publication(BaseModel, frozen=True):
    """Where an adapter was published: `commit` is the hub's, the same as before if nothing had changed."""

    repo: str
    url: str
    commit: str
    adapter_sha256: str


def find_published(workspace: str, name: str, publishing: PublishingConfig) -> Entry:
    """Return the pointer's entry for what is served under `name`: only what passed its gate ever gets there.

    Raises:
        PreflowError: nothing was promoted, no repository is named, or the adapter is not whole.
    """
    if not publishing.repo:
        raise PreflowError("publishing.repo is empty: name the repository on the hub, owner/name")
    otherwise = "only an adapter that passed its gate is published; promote one first"
    pointer = read_promoted(workspace, name, otherwise)
    Workspace(workspace).verify_folder(pointer.current.uri)
    return pointer.current


async def publish(
    entry: Entry, workspace: str, publishing: PublishingConfig, evidence: bytes | None = None
) -> Publication:
    """Upload the adapter of a pointer's entry with its card in one commit; what is there already is not sent again.

    The card names the evidence of its win rate, if there is any; that is uploaded where `publishing` says so.

    Raises:
        PreflowError: the token is missing or refused, the hub does not answer, or a manifest is missing.
    """
    provenance = Provenance.of(entry, workspace)
    card = write_card(provenance, publishing, evidence)
    token = await resolve_secret(publishing.token, "publishing.token")
    store = Workspace.holding(entry.uri)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in store.verify_folder(entry.uri).keys() - {COMMITTED}:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(store.read_bytes(f"{entry.uri}/{name}"))
        settings = json.loads((folder / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = base_name(provenance, publishing)  # its public name, and no path
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        (folder / "README.md").write_text(card, encoding="utf-8")
        if evidence is not None and publishing.evidence:
            (folder / "evidence.json").write_bytes(evidence)
        found = _upload(folder, entry.adapter_sha256, publishing, str(token))
    logger.info("adapter %s is published as %s (commit %s)", entry.adapter_sha256[:12], found.url, found.commit[:12])
    return found


def _upload(folder: Path, sha256: str, publishing: PublishingConfig, token: str) -> Publication:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        hub.create_repo(publishing.repo, private=publishing.private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=publishing.repo, folder_path=folder, commit_message=f"Adapter {sha256[:12]}, by preflow"
        )
    except HfHubHTTPError as error:
        status, repo, key = error.response.status_code, publishing.repo, publishing.token
        remedies = {
            401: f"it does not accept the token {key}: make one that may write and set it there",
            403: f"the token {key} may not write to {repo}: give it the right, or another repo",
            404: f"there is no {repo} that the token {key} may see: check owner and name",
        }
        remedy = remedies.get(status, "it is down or busy: run again later, only what is missing is sent")
        outcome = "nothing was uploaded" if status < 500 else UNKNOWN
        # The original's text may hold what was sent: it is not chained.
        raise PreflowError(
            f"{hub.endpoint} answered {status} to the publication of {repo} ({outcome}): {remedy}"
        ) from None
    except (httpx2.HTTPError, OSError, RuntimeError) as error:  # RuntimeError: the client's, of a large file
        raise PreflowError(
            f"{hub.endpoint} does not take it ({type(error).__name__}; {UNKNOWN}). Check the network, and HF_ENDPOINT "
            "if it is set, and run again: only what is missing is sent"
        ) from None
    return Publication(repo=publishing.repo, url=done.repo_url, commit=done.oid, adapter_sha256=sha256)
