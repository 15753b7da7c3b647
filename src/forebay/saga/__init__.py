"""Sagas: a chain of steps that ends with all its effects, with none, or parked where a person sees it."""

from forebay.saga.definition import Saga, saga
from forebay.saga.log import SagaLog, open_saga_log
from forebay.saga.memory_log import MemorySagaLog
from forebay.saga.records import SagaState
from forebay.saga.run import SagaRun
from forebay.saga.step import Done, NothingDone

__all__ = ["Done", "MemorySagaLog", "NothingDone", "Saga", "SagaLog", "SagaRun", "SagaState", "open_saga_log", "saga"]
