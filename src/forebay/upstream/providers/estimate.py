"""How many tokens a request's JSON stands for, estimated without a tokenizer.

Text is its bytes over so many to a token: 4 by OpenAI's rule of thumb, 3.5 by Anthropic's glossary. Bytes rather than
characters, since three bytes of a Chinese or Japanese character are about one token; what JSON escapes counts as what
it stands for. JSON's own signs are counted with the text: they stand for the roles and borders that a provider adds. So
nothing need be taken apart: the JSON is counted as it is sent. Tools are text. What travels in base64 is not:

- an image costs what it is scaled down to: 85 tokens on OpenAI where ``detail`` is low, else 765 (a square of 1,024
  pixels, four tiles); on Anthropic about 1,600 (1.15 megapixels over 750). Sources: the vision guides of both.
- sound: some 10 tokens a second, about 2,000 signs of base64 each at 16 kB/s.
- a document: about 2,000 tokens a page, and a page is about 100 kB.

The last two are guesses. All of it is corrected by what the account learns (`InputTokenRatio`). What a request only points
at (files, earlier responses, a conversation that the provider keeps) cannot be seen, and is left to that as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

import msgspec

_LOW_DETAIL: Final = 85
_PER_SOUND: Final = 2000  # signs of base64 to a token
_PER_DOCUMENT: Final = 50
_LEAST_SOUND: Final = 10
_LEAST_DOCUMENT: Final = 500

_IMAGES: Final = frozenset({"image_url", "input_image", "image"})
_SOUNDS: Final = frozenset({"input_audio", "audio"})
_DOCUMENTS: Final = frozenset({"document", "file", "input_file"})
_NULL: Final = b"null"
_ESCAPE: Final = b"\\"
_LONG_ESCAPE: Final = b"\\u"  # six signs, for some three bytes
_TYPE: Final = b'"type"'
_MEDIA: Final = re.compile(rb'"type"\s*:\s*"(?:%s)"' % "|".join(sorted(_IMAGES | _SOUNDS | _DOCUMENTS)).encode())
_NUMBERS: Final = re.compile(rb"\[[\s[]*\d")


def estimate_tokens(pieces: Iterable[bytes], *, bytes_per_token: float, image_tokens: int) -> int:
    """Estimated tokens of pieces of a request's JSON: text by its bytes, media by their kind, a number by itself.

    A prompt may be a list of tokens, hence the last.
    """
    size, tokens = 0, 0
    for part in pieces:
        if _NUMBERS.match(part):
            tokens += part.count(b",") + 1
        elif part != _NULL:
            size += len(part)
            if _ESCAPE in part:
                size -= part.count(_ESCAPE) + 2 * part.count(_LONG_ESCAPE)
            if _TYPE in part and _MEDIA.search(part):
                media, signs = _all_media(part, image_tokens)
                tokens, size = tokens + media, size - signs
    return tokens - int(-max(0, size) // bytes_per_token)


def _all_media(sent: bytes, image_tokens: int) -> tuple[int, int]:
    """Tokens of the images, sounds and documents in a piece of JSON, and how many signs of it are theirs."""
    tokens, signs = 0, 0
    try:
        rest = [msgspec.json.decode(sent)]
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return 0, 0
    while rest:
        part = rest.pop()
        if isinstance(part, list):
            rest.extend(part)
        elif isinstance(part, dict):
            media = _media(part, image_tokens)
            if media is None:
                rest.extend(part.values())
            else:
                tokens += media
                signs += len(msgspec.json.encode(part))
    return tokens, signs


def _media(part: dict[str, Any], image_tokens: int) -> int | None:
    """Tokens of an image, a sound or a document; None if the part is none of these."""
    kind = part.get("type")
    if not isinstance(kind, str):
        return None
    if kind in _IMAGES:
        return _LOW_DETAIL if _detail(part) == "low" else image_tokens
    if kind in _SOUNDS:
        return max(_LEAST_SOUND, _payload(part) // _PER_SOUND)
    if kind in _DOCUMENTS and (payload := _payload(part)):
        return max(_LEAST_DOCUMENT, payload // _PER_DOCUMENT)
    return None


def _detail(part: dict[str, Any]) -> object:
    url = part.get("image_url")
    return url.get("detail") if isinstance(url, dict) else part.get("detail")


def _payload(part: dict[str, Any]) -> int:
    """Signs of base64 in a part: the longest string within it, if that is data and not text."""
    source = part.get("source", part.get("file", part.get("input_audio", part)))
    if not isinstance(source, dict) or source.get("type") == "text":
        return 0
    return max((len(value) for key in ("data", "file_data") if isinstance(value := source.get(key), str)), default=0)
