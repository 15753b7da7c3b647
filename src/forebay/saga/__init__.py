"""Sagas: a chain of steps that ends with all its effects, with none, or parked where a person sees it."""

from forebay.saga.log import SagaLog, open_saga_log
from forebay.saga.memory_log import MemorySagaLog
from forebay.saga.records import SagaState
from forebay.saga.saga_admin import SagaAdmin
from forebay.saga.saga_view import SagaView

__all__ = ["MemorySagaLog", "SagaAdmin", "SagaLog", "SagaState", "SagaView", "open_saga_log"]
