"""Keys, by name: from the environment or from a Prefect Secret block."""

import os
from typing import Any

from tasks.errors import PreflowError


async def resolve_secret(name: str | None, field: str) -> str | None:
    """Return the secret that `name` names: an environment variable (`env:NAME`) or a Prefect Secret block.

    `field` is the setting's name, for the message. Raises `PreflowError` when there is none; no message shows a value.
    """
    if name is None:
        return None
    if name.startswith("env:"):
        variable = name.removeprefix("env:")
        value, remedy = os.environ.get(variable), f"set it where the flow runs: export {variable}=..."
    else:
        value, remedy = await _load_block(name, field), "give the Secret block a text value"
    value = (value or "").strip()
    if not value:
        raise PreflowError(f"{field} names {name}, but it is not set or empty; {remedy}")
    if not (value.isascii() and value.isprintable()):
        raise PreflowError(f"{field} names {name}, whose value cannot be a key: it holds line breaks or non-ASCII text")
    return value


async def _load_block(name: str, field: str) -> str | None:
    import httpx  # both imports would cost every process a second or two
    from prefect.blocks.system import Secret

    create = f"""python -c "from prefect.blocks.system import Secret; Secret(value=input('value: ')).save('{name}')" """
    try:
        block: Any = await Secret.aload(name)
    except ValueError as error:
        raise PreflowError(
            f"{field} names the Prefect Secret block {name!r}, which does not exist. Create it in the Prefect UI "
            f"(Blocks > Secret), or with: {create.strip()}; or name an environment variable: env:NAME"
        ) from error
    except (httpx.HTTPError, OSError, RuntimeError) as error:
        raise PreflowError(
            f"{field} names the Prefect Secret block {name!r}, which could not be loaded from the Prefect server "
            f"({type(error).__name__}): check PREFECT_API_URL, or name an environment variable: env:NAME"
        ) from error
    # Not `get()`: that would turn a key of digits into a number.
    value = block.value.get_secret_value()
    return value if isinstance(value, str) else None
