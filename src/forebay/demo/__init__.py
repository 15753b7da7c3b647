"""The surge: fifty agents on one key and ten thousand tasks, first under a classic supervisor, then under Forebay."""

from forebay.demo.provider import MissingKey, Provider, provider_from, warning
from forebay.demo.play import DemoFailed, resume, run
from forebay.demo.settings import ENDLESS, Settings

__all__ = ["ENDLESS", "DemoFailed", "MissingKey", "Provider", "Settings", "provider_from", "resume", "run", "warning"]
