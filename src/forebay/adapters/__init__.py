"""Agents as they are, made into handlers: one file for each framework, imported when one of its agents is met."""

from forebay.adapters.detect import FRAMEWORKS, Config, as_handler
from forebay.adapters.handler import Handler, SupportsHandler
from forebay.adapters.object_codec import ObjectCodec, SerializableClass
from forebay.adapters.typed_codec import codec_for, type_name

__all__ = [
    "FRAMEWORKS",
    "Config",
    "Handler",
    "ObjectCodec",
    "SerializableClass",
    "SupportsHandler",
    "as_handler",
    "codec_for",
    "type_name",
]
