"""Keys, by name: from the environment, from a Prefect Secret block, or from Google Secret Manager."""

import os
from typing import Any

from tasks.errors import PreflowError


async def resolve_secret(name: str | None, field: str) -> str | None:
    """Return the secret that `name` names: env:NAME, a Secret block's name, or gcp-secret:NAME for a GcpSecret block.

    `field` is the setting's name, for the message. Raises `PreflowError` when there is none; no message shows a value.
    """
    if name is None:
        return None
    if name.startswith("env:"):
        variable = name.removeprefix("env:")
        value, remedy = os.environ.get(variable), f"set it where the flow runs: export {variable}=..."
    elif name.startswith("gcp-secret:"):
        value, remedy = await _read_gcp_secret(name.removeprefix("gcp-secret:"), field), "give it a new version"
    else:
        value, remedy = await _load_secret(name, field), "give the Secret block a text value"
    value = (value or "").strip()
    if not value:
        raise PreflowError(f"{field} names {name}, but it is not set or empty; {remedy}")
    if not (value.isascii() and value.isprintable()):
        raise PreflowError(f"{field} names {name}, whose value cannot be a key: it holds line breaks or non-ASCII text")
    return value


async def _load_secret(name: str, field: str) -> str | None:
    from prefect.blocks.system import Secret

    code = f"from prefect.blocks.system import Secret; Secret(value=input('value: ')).save('{name}')"
    block = await _load_block(Secret, name, field, f'in the Prefect UI (Blocks > Secret), or with: python -c "{code}"')
    value = block.value.get_secret_value()  # not `get()`: that would turn a key of digits into a number
    return value if isinstance(value, str) else None


async def _read_gcp_secret(name: str, field: str) -> str:
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from prefect_gcp import GcpSecret

    create = f"in the Prefect UI (Blocks > GCP Secret), or with: PREFLOW_GCP_SECRETS={name} deployments/register.sh"
    block = await _load_block(GcpSecret, name, field, create)
    try:
        content: bytes = await block.aread_secret()
    except (GoogleAPIError, GoogleAuthError, OSError, ValueError) as error:
        raise PreflowError(
            f"{field} names the GcpSecret block {name!r}, and Secret Manager does not give {block.secret_name!r} "
            f"of project {block.gcp_credentials.project} ({type(error).__name__}). Check that it exists, and that the "
            "block's credentials have the role roles/secretmanager.secretAccessor on it."
        ) from error
    return content.decode("utf-8", "replace")


async def _load_block(kind: Any, name: str, field: str, create: str) -> Any:
    import httpx  # as Prefect above, it would cost every process a second or two

    called = f"{field} names the {kind.__name__} block {name!r}"
    try:
        return await kind.aload(name)
    except ValueError as error:
        raise PreflowError(
            f"{called}, which does not exist. Create it {create}; or name an environment variable: env:NAME"
        ) from error
    except (httpx.HTTPError, OSError, RuntimeError) as error:
        raise PreflowError(
            f"{called}, which could not be loaded from the Prefect server ({type(error).__name__}): check "
            "PREFECT_API_URL, or name an environment variable: env:NAME"
        ) from error
