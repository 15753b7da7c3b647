"""Sagas: a chain of steps that ends with all its effects, with none, or parked where a person sees it."""

from forebay.saga.log import SagaLog, open_saga_log
from forebay.saga.memory_log import MemorySagaLog
from forebay.saga.records import SagaState

__all__ = ["MemorySagaLog", "SagaLog", "SagaState", "open_saga_log"]
