"""LangChain's messages and documents, and LangGraph's commands and interrupts, as plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
from langchain_core import messages
from langchain_core.documents import Document
from langgraph.types import Command, Interrupt, Send

from forebay.adapters.object_codec import ObjectCodec, SerializableClass
from forebay.task import Resume

_MODELS = (
    messages.HumanMessage,
    messages.AIMessage,
    messages.SystemMessage,
    messages.ToolMessage,
    messages.ChatMessage,
    messages.FunctionMessage,
    messages.RemoveMessage,
    messages.HumanMessageChunk,
    messages.AIMessageChunk,
    messages.SystemMessageChunk,
    messages.ToolMessageChunk,
    messages.ChatMessageChunk,
    messages.FunctionMessageChunk,
    Document,
)


def _model_fields(model: Any) -> dict[str, Any]:
    # One level only: `model_dump` would silently turn objects in fields of type Any into dicts.
    return {**model.__dict__, **(model.__pydantic_extra__ or {})}


def _dataclass_fields(thing: Any) -> dict[str, Any]:
    return {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}


def _send_fields(send: Any) -> dict[str, Any]:
    timeout = getattr(send, "timeout", None)  # since LangGraph 1.2; it has no plain form
    return {"node": send.node, "arg": send.arg, **({} if timeout is None else {"timeout": timeout})}


#: The complete list of classes that stored data may name.
CODEC = ObjectCodec(
    [
        *(SerializableClass(model, _model_fields, model.model_validate) for model in _MODELS),
        SerializableClass(Command, _dataclass_fields, lambda fields: Command(**fields)),
        SerializableClass(Interrupt, _dataclass_fields, lambda fields: Interrupt(**fields)),
        SerializableClass(Resume, msgspec.structs.asdict, lambda fields: Resume(**fields)),
        SerializableClass(Send, _send_fields, lambda fields: Send(**fields)),
    ]
)
