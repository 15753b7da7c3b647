"""The table of endpoints: which request costs money at a provider, and how its price is found.

`docs/quotas.md` shows the same table, printed from here. Sources: the API references of OpenAI, Azure OpenAI and
Anthropic, and the paths in their SDKs (openai 2, anthropic 0.8x), November 2026.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from typing import Final, NamedTuple
from urllib.parse import unquote

_MAX_DECODED: Final = 3  # times that a path is decoded; one that is escaped more often is not an endpoint
_PARAMETERS: Final = re.compile("[;?#]")
_PLACEHOLDER: Final = re.compile(r"\\\{[a-z_]+\\\}")


class Endpoint(Enum):
    """An endpoint of a provider's API."""

    __hash__ = object.__hash__  # Enum hashes its name in Python, and each call looks endpoints up

    CHAT = "chat"  # OpenAI's chat completions
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    EMBEDDINGS = "embeddings"
    MESSAGES = "messages"  # Anthropic's
    COUNT_TOKENS = "count_tokens"
    IMAGES = "images"
    SPEECH = "speech"
    MODELS = "models"
    OTHER = "other"  # counted as one request; nothing more is known


class Billing(Enum):
    """The way in which the price of a request is found."""

    __hash__ = object.__hash__

    USAGE = "by the usage in its answer"
    CHARACTERS = "by the characters of its text"
    FREE = "costs nothing"
    UNPRICED = "unknown: rejected under a budget"


class EndpointRule(NamedTuple):
    """A row of the table.

    Attributes:
        path: of the endpoint, below the version: ``{id}`` is one segment, ``*`` any number.
        endpoint: as which it is read.
        billing: how its price is found.
        reason: why it has none, or where the usage is.
    """

    path: str
    endpoint: Endpoint
    billing: Billing
    reason: str


_USAGE, _FREE, _UNPRICED = Billing.USAGE, Billing.FREE, Billing.UNPRICED
_OTHER: Final = Endpoint.OTHER
_LATER: Final = "its cost arises later, in a job"
_ELSEWHERE: Final = "its cost arises over another connection"
_RUNS: Final = "it makes calls that are not seen here"
_STORAGE: Final = "it is billed by time or storage"

ENDPOINT_RULES: Final[Sequence[EndpointRule]] = (
    EndpointRule("/batches/{id}/cancel", _OTHER, _FREE, "it stops a job"),
    EndpointRule("/messages/batches/{id}/cancel", _OTHER, _FREE, "it stops a job"),
    EndpointRule("/batches", _OTHER, _UNPRICED, _LATER),
    EndpointRule("/messages/batches", _OTHER, _UNPRICED, _LATER),
    EndpointRule("/fine_tuning/jobs/{id}/cancel", _OTHER, _FREE, "it stops a job"),
    EndpointRule("/fine_tuning/jobs/{id}/pause", _OTHER, _FREE, "it stops a job"),
    EndpointRule("/fine_tuning/*", _OTHER, _UNPRICED, _LATER),
    EndpointRule("/evals/*", _OTHER, _UNPRICED, _LATER),
    EndpointRule("/evals", _OTHER, _UNPRICED, _LATER),
    EndpointRule("/threads/*", _OTHER, _UNPRICED, _RUNS),
    EndpointRule("/threads", _OTHER, _UNPRICED, _RUNS),
    EndpointRule("/assistants/*", _OTHER, _UNPRICED, _RUNS),
    EndpointRule("/assistants", _OTHER, _UNPRICED, _RUNS),
    EndpointRule("/chatkit/*", _OTHER, _UNPRICED, _RUNS),
    EndpointRule("/agents/*", _OTHER, _UNPRICED, _RUNS),
    EndpointRule("/agents", _OTHER, _UNPRICED, _RUNS),
    EndpointRule("/sessions/*", _OTHER, _UNPRICED, _RUNS),
    EndpointRule("/sessions", _OTHER, _UNPRICED, _RUNS),
    EndpointRule("/deployments/{id}/run", _OTHER, _UNPRICED, _RUNS),
    EndpointRule("/realtime/*", _OTHER, _UNPRICED, _ELSEWHERE),
    EndpointRule("/realtime", _OTHER, _UNPRICED, _ELSEWHERE),
    EndpointRule("/live/*", _OTHER, _UNPRICED, _ELSEWHERE),
    EndpointRule("/videos/*", _OTHER, _UNPRICED, "it is billed by the second of video"),
    EndpointRule("/videos", _OTHER, _UNPRICED, "it is billed by the second of video"),
    EndpointRule("/containers/*", _OTHER, _UNPRICED, _STORAGE),
    EndpointRule("/containers", _OTHER, _UNPRICED, _STORAGE),
    EndpointRule("/vector_stores/*", _OTHER, _UNPRICED, _STORAGE),
    EndpointRule("/vector_stores", _OTHER, _UNPRICED, _STORAGE),
    EndpointRule("/audio/transcriptions", _OTHER, _UNPRICED, "it is billed by the minute of sound in a form"),
    EndpointRule("/audio/translations", _OTHER, _UNPRICED, "it is billed by the minute of sound in a form"),
    EndpointRule("/images/variations", _OTHER, _UNPRICED, "its models have no price by token"),
    EndpointRule("/complete", _OTHER, _UNPRICED, "its answer has no usage"),
    EndpointRule("/conversations/{id}/items", _OTHER, _FREE, "it stores input"),
    EndpointRule("/conversations/{id}", _OTHER, _FREE, "it stores metadata"),
    EndpointRule("/conversations", _OTHER, _FREE, "it stores input"),
    EndpointRule("/files", _OTHER, _FREE, "it stores a file"),
    EndpointRule("/uploads/{id}/parts", _OTHER, _FREE, "it stores a file"),
    EndpointRule("/uploads/{id}/complete", _OTHER, _FREE, "it stores a file"),
    EndpointRule("/uploads/{id}/cancel", _OTHER, _FREE, "it stores nothing"),
    EndpointRule("/uploads", _OTHER, _FREE, "it stores a file"),
    EndpointRule("/moderations", _OTHER, _FREE, "it is free at its provider"),
    EndpointRule("/responses/{id}/cancel", _OTHER, _FREE, "it stops a response in the background"),
    EndpointRule("/responses/input_tokens", Endpoint.COUNT_TOKENS, _FREE, "it counts tokens"),
    EndpointRule("/messages/count_tokens", Endpoint.COUNT_TOKENS, _FREE, "it counts tokens"),
    EndpointRule("/chat/completions", Endpoint.CHAT, _USAGE, "`usage`; of a stream, in its last chunk"),
    EndpointRule("/completions", Endpoint.COMPLETIONS, _USAGE, "`usage`; of a stream, in its last chunk"),
    EndpointRule("/responses/compact", Endpoint.RESPONSES, _USAGE, "`usage`"),
    EndpointRule("/responses", Endpoint.RESPONSES, _USAGE, "`usage`; in the background, of the later GET"),
    EndpointRule("/embeddings", Endpoint.EMBEDDINGS, _USAGE, "`usage`"),
    EndpointRule("/images/generations", Endpoint.IMAGES, _USAGE, "`usage`, of models that are priced by token"),
    EndpointRule("/images/edits", Endpoint.IMAGES, _USAGE, "`usage`; as JSON only, since a form cannot be read"),
    EndpointRule("/audio/speech", Endpoint.SPEECH, Billing.CHARACTERS, "of models that are priced by character"),
    EndpointRule("/messages", Endpoint.MESSAGES, _USAGE, "`usage`, with writes to the cache and searches"),
)
"""Requests that are neither GET, HEAD, OPTIONS nor DELETE, which cost nothing.

Of several rows that fit, the longest path counts. Any other path is `Billing.UNPRICED`.
"""

UNKNOWN_ENDPOINT: Final = EndpointRule("*", _OTHER, _UNPRICED, "its price is not known")


_PAID: Final = frozenset({"chat", "completions", "responses", "messages", "embeddings", "images", "audio"})


def _compile(path: str) -> re.Pattern[str]:
    pattern = _PLACEHOLDER.sub("[^/]+", re.escape(path)).replace(r"\*", ".+")
    return re.compile(f"(?P<prefix>.*){pattern}")


def _precision(rule: EndpointRule) -> float:
    """Return how much of a path a row names: ``/threads/*`` more than ``/messages``, which it may end with."""
    return rule.path.count("/") - 0.5 * rule.path.count("*")


_COMPILED: Final = tuple((_compile(rule.path), rule) for rule in sorted(ENDPOINT_RULES, key=_precision, reverse=True))


def find_rule(path: str) -> EndpointRule:
    """Return the row for a path without its query."""
    normal = normalize_path(path)
    for pattern, rule in _COMPILED:
        if (found := pattern.fullmatch(normal)) is not None:
            # A lenient server may stop reading at the first ending that it knows.
            hidden = rule.billing is Billing.FREE and not _PAID.isdisjoint(found["prefix"].split("/"))
            return UNKNOWN_ENDPOINT if hidden else rule
    return UNKNOWN_ENDPOINT


def normalize_path(path: str) -> str:
    """Return a path as the most lenient server reads it, so that no other spelling of an endpoint passes unmetered.

    Escapes are decoded, letters are lower-case, backslashes are slashes; parameters (``;x``), empty and dot segments
    are gone. A path that is escaped many times over is returned empty.
    """
    for _ in range(_MAX_DECODED):
        decoded = unquote(path)
        if decoded == path:
            break
        path = decoded
    else:
        return ""
    segments: list[str] = []
    for segment in path.lower().replace("\\", "/").split("/"):
        name = _PARAMETERS.split(segment, 1)[0].strip()
        if name == "..":
            del segments[-1:]
        elif name not in ("", "."):
            segments.append(name)
    return "/" + "/".join(segments)
