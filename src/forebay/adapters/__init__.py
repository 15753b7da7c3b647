"""Agents as they are, made into handlers: one file for each framework, imported when one of its agents is met."""

from forebay.adapters.handler import Handler, HandlesTasks
from forebay.adapters.objects import Kind, ObjectCodec
from forebay.adapters.recognise import FRAMEWORKS, Config, as_handler
from forebay.adapters.typed import codec_for, type_name

__all__ = [
    "FRAMEWORKS",
    "Config",
    "Handler",
    "HandlesTasks",
    "Kind",
    "ObjectCodec",
    "as_handler",
    "codec_for",
    "type_name",
]
