"""Sagas: a chain of steps that ends with all its effects, with none, or parked where a person sees it."""

from forebay.saga.definition import Saga, saga
from forebay.saga.log import SagaLog, open_saga_log
from forebay.saga.memory_log import MemorySagaLog
from forebay.saga.records import SagaState
from forebay.saga.run import SagaRun
from forebay.saga.saga_admin import SagaAdmin
from forebay.saga.saga_view import SagaView
from forebay.saga.step import Done, NothingDone

__all__ = [
    "Done",
    "MemorySagaLog",
    "NothingDone",
    "Saga",
    "SagaAdmin",
    "SagaLog",
    "SagaRun",
    "SagaState",
    "SagaView",
    "open_saga_log",
    "saga",
]
