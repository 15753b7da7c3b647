"""Adapters that turn agents into handlers: one file per framework, imported when one of its agents is registered."""

from forebay.adapters.declared_types import codec_for, type_name
from forebay.adapters.detect import FRAMEWORKS, as_handler, is_agent
from forebay.adapters.handler import Config, Handler, SupportsHandler
from forebay.adapters.object_codec import ObjectCodec, SerializableClass

__all__ = [
    "FRAMEWORKS",
    "Config",
    "Handler",
    "ObjectCodec",
    "SerializableClass",
    "SupportsHandler",
    "as_handler",
    "codec_for",
    "is_agent",
    "type_name",
]
