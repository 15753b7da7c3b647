"""The client of a service of AWS, and its failures in words.

It is botocore, whose calls block: whoever uses it runs them in threads. Making one reads many files.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import botocore.exceptions
import botocore.loaders
import botocore.parsers
import botocore.session
from botocore.config import Config

CONNECT_TIMEOUT: Final = 3  # seconds
_UNREADABLE: Final = (botocore.parsers.ResponseParserError, LookupError)  # such as a page of a proxy
FAILURES: Final = (
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    OSError,
    ValueError,
    *_UNREADABLE,
)

_NO_CREDENTIALS: Final = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.TokenRetrievalError,
)


def create_client(  # noqa: PLR0913 - each has a name
    service: str, *, region: str | None, endpoint: str | None, connections: int, read_timeout: int, attempts: int
) -> Any:
    """Return a client of a service. A call that is throttled or not answered is repeated, and ends.

    Args:
        service: its name, such as ``"sqs"``.
        region: None for that of the environment or the profile.
        endpoint: the address of another server than that of the region; None for none.
        connections: calls at a time.
        read_timeout: seconds within which an attempt is answered.
        attempts: how often a call is tried.
    """
    config = Config(
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=read_timeout,
        max_pool_connections=connections,
        retries={"total_max_attempts": attempts, "mode": "standard"},
    )
    session = botocore.session.get_session()
    session.register_component("data_loader", _loader())
    return session.create_client(service, region_name=region, endpoint_url=endpoint, config=config)


@functools.cache
def _loader() -> Any:
    """Return the loader of the client's descriptions, which takes a second to read them and keeps what it has read."""
    return botocore.loaders.create_loader()


def error_code(error: BaseException) -> str | None:
    """Return the code with which the service answered; None if the error is no answer of it."""
    if not isinstance(error, botocore.exceptions.ClientError):
        return None
    return str(error.response.get("Error", {}).get("Code", "an error"))


def failure_in_words(error: Exception, *, setting: str) -> tuple[str, str]:
    """Return why a call had no answer, and what to do. No credential is in it, nor anything that was sent.

    Args:
        error: one of `FAILURES`.
        setting: where a region can be given.
    """
    if isinstance(error, _NO_CREDENTIALS):
        return "there are no credentials", "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role."
    if isinstance(error, botocore.exceptions.NoRegionError):
        return "there is no region", f"Add region= to {setting}, or set AWS_DEFAULT_REGION."
    if isinstance(error, _UNREADABLE):
        why = f"what answers in its place is no service of AWS ({type(error).__name__})"
        return why, "Check the endpoint, and a proxy on the way."
    return f"it does not answer ({type(error).__name__})", "Check the endpoint, the region and the network."
