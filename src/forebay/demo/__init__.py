"""The surge: fifty agents on one key and ten thousand tasks, first under a classic supervisor, then under Forebay."""

from importlib.util import find_spec
from typing import Final

from forebay.demo.play import DemoFailed, resume, run
from forebay.demo.provider import MissingKey, Provider, provider_from, warning
from forebay.demo.settings import ENDLESS, Settings

EXTRAS: Final = ("aiohttp", "langgraph", "matplotlib", "openai")


def absent() -> list[str]:
    """Libraries of the demo's extra that are not installed."""
    return [name for name in EXTRAS if find_spec(name) is None]


__all__ = [
    "ENDLESS",
    "EXTRAS",
    "DemoFailed",
    "MissingKey",
    "Provider",
    "Settings",
    "absent",
    "provider_from",
    "resume",
    "run",
    "warning",
]
