"""A call by litellm's SDK, in its own environment: ``litellm_sdk.py MODEL API_BASE [stream]``. Prints JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import litellm

litellm.suppress_debug_info = True  # it goes to the standard output


async def _call(model: str, api_base: str, how: str = "") -> dict[str, Any]:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Which river?"}], "max_tokens": 50}
    try:
        answer = await litellm.acompletion(
            model=model, api_base=api_base, api_key="sk-1", stream=how == "stream", **asked
        )
        if how == "stream":
            parts = [part async for part in answer]
            return {"text": "".join(part.choices[0].delta.content or "" for part in parts)}
    except Exception as error:  # noqa: BLE001 - its class is the result
        return {"error": type(error).__name__, "status": getattr(error, "status_code", None)}
    return {"text": answer.choices[0].message.content, "tokens": answer.usage.total_tokens}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_call(*sys.argv[1:]))))  # noqa: T201
