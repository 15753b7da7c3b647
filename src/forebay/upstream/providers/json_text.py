"""JSON as clients write it: half a surrogate pair is allowed there, and refused by strict decoders."""

from __future__ import annotations

import re
from typing import Final

_ESCAPED_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPE: Final = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)


def replace_lone_surrogates(text: bytes) -> bytes:
    """Return JSON with U+FFFD for each half of a surrogate pair, for reading; its length stays.

    Encoders of JavaScript and Python write such halves as escapes, for example where text was cut within an emoji.
    Servers differ in whether they accept them, so the bytes that are sent stay as they are.
    """
    if _ESCAPED_SURROGATE.search(text) is None:
        return text
    return _ESCAPE.sub(lambda found: found[0] if found[1] is None else b"\\ufffd", text)
