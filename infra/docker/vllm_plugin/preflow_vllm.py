"""A plugin of vLLM: a LoRA adapter that is loaded in place of another gets an identity of its own.

vLLM (0.32) gives the new adapter the number of the old one and marks every later request `load_inplace`. So each engine
step reads the adapter from disk again, and whichever request came last decides whose weights all of them get: requests
in flight at the switch pull the old adapter back in, under requests that came after it, and what they leave in the
prefix cache is wrong from then on. With a number of its own the new adapter is loaded once, next to the old one;
requests in flight finish on the adapter they began with.

vLLM finds the plugin through the entry point next to this file when the folder is on PYTHONPATH.
"""

from itertools import count
from typing import Any

# vLLM counts its own adapters up from 1.
FIRST_NUMBER = 1 << 30


def register() -> None:
    """Change how the engine's client loads an adapter; vLLM calls this in each of its processes."""
    from vllm.v1.engine.async_llm import AsyncLLM

    if not hasattr(AsyncLLM.add_lora, "preflow"):
        AsyncLLM.add_lora = _with_own_number(AsyncLLM.add_lora)


def _with_own_number(load: Any) -> Any:
    numbers = count(FIRST_NUMBER)
    replaced: dict[str, int] = {}

    async def add_lora(self: Any, lora_request: Any) -> bool:
        if not lora_request.load_inplace:
            return bool(await load(self, lora_request))
        before, lora_request.lora_int_id = lora_request.lora_int_id, next(numbers)
        lora_request.load_inplace = False
        loaded = bool(await load(self, lora_request))
        # The one replaced the time before last: a request that still runs on it would have it loaded again.
        if (old := replaced.pop(lora_request.lora_name, None)) is not None:
            await self.remove_lora(old)
        replaced[lora_request.lora_name] = before
        return loaded

    add_lora.preflow = True  # type: ignore[attr-defined]
    return add_lora
