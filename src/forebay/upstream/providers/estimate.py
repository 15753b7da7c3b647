"""An estimate of a request's input tokens, without a tokenizer.

Text counts by its bytes: 4 to a token by OpenAI's rule of thumb, 3.5 by Anthropic's glossary. Bytes and not characters,
since the three bytes of a Chinese or Japanese character are about one token; an escaped character counts as itself. The
punctuation of JSON is counted with the text, for the roles and separators that a provider adds, so the JSON is measured
as it is sent, without being decoded. Tools are text. Media in base64 is not:

- an image costs what it is scaled down to: 85 tokens on OpenAI where ``detail`` is low, else 765 (a square of 1,024
  pixels, four tiles), and on gpt-4o-mini 33 times as many; on Anthropic about 1,600 (1.15 megapixels over 750).
  Sources: the vision guides of both.
- sound: some 10 tokens a second, about 2,000 characters of base64 each at 16 kB/s.
- a document: about 2,000 tokens a page, and a page is about 100 kB.

The last two are guesses. `TokenEstimates` corrects the estimate by what the account was charged. Content that a
request only refers to (files, earlier responses, a conversation stored by the provider) is invisible here and left to
it, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

import msgspec

_LOW_DETAIL: Final = 9  # times fewer tokens
_SOUND_BASE64_PER_TOKEN: Final = 2000  # characters
_DOCUMENT_BASE64_PER_TOKEN: Final = 50
_MIN_SOUND: Final = 10  # tokens
_MIN_DOCUMENT: Final = 500

_IMAGES: Final = frozenset({"image_url", "input_image", "image"})
_SOUNDS: Final = frozenset({"input_audio", "audio"})
_DOCUMENTS: Final = frozenset({"document", "file", "input_file"})
_MAX_PARTS: Final = 100_000  # of a value that is searched for media part by part
_NULL: Final = b"null"
_ESCAPE: Final = b"\\"
_LONG_ESCAPE: Final = b"\\u"  # six characters, for about three bytes
_TYPE: Final = b'"type"'
_MEDIA: Final = re.compile(rb'"type"\s*:\s*"(?:%s)"' % "|".join(sorted(_IMAGES | _SOUNDS | _DOCUMENTS)).encode())
_TOKEN_IDS: Final = re.compile(rb"\[[\s[]*\d")


def estimate_tokens(pieces: Iterable[bytes], *, bytes_per_token: float, image_tokens: int) -> int:
    """Return the estimated tokens of pieces of a request's JSON.

    Args:
        pieces: JSON values; one that is a list of token ids counts one for each.
        bytes_per_token: of text.
        image_tokens: of an image.
    """
    size, tokens = 0, 0
    for piece in pieces:
        if _TOKEN_IDS.match(piece):
            tokens += piece.count(b",") + 1
        elif piece != _NULL:
            size += len(piece)
            if _ESCAPE in piece:
                size -= piece.count(_ESCAPE) + 2 * piece.count(_LONG_ESCAPE)
            if _TYPE in piece and _MEDIA.search(piece):
                media_tokens, media_size = _estimate_media(piece, image_tokens)
                tokens, size = tokens + media_tokens, size - media_size
    return tokens - int(-max(0, size) // bytes_per_token)


def _estimate_media(piece: bytes, image_tokens: int) -> tuple[int, int]:
    """Return the tokens of the images, sounds and documents in a JSON value, and how many of its bytes they take."""
    tokens, size = 0, 0
    if piece.count(b"{") + piece.count(b"[") > _MAX_PARTS:  # then at most so many, besides their bytes
        return image_tokens * len(_MEDIA.findall(piece)), 0
    try:
        rest = [msgspec.json.decode(piece)]
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return 0, 0
    while rest:
        part = rest.pop()
        if isinstance(part, list):
            rest.extend(part)
        elif isinstance(part, dict):
            media_tokens = _media_tokens(part, image_tokens)
            if media_tokens is None:
                rest.extend(part.values())
            else:
                tokens += media_tokens
                size += len(msgspec.json.encode(part))
    return tokens, size


def _media_tokens(part: dict[str, Any], image_tokens: int) -> int | None:
    """Return the tokens of an image, a sound or a document; None if the part is none of these."""
    kind = part.get("type")
    if not isinstance(kind, str):
        return None
    if kind in _IMAGES:
        return image_tokens // _LOW_DETAIL if _detail(part) == "low" else image_tokens
    if kind in _SOUNDS:
        return max(_MIN_SOUND, _base64_size(part) // _SOUND_BASE64_PER_TOKEN)
    if kind in _DOCUMENTS and (size := _base64_size(part)):
        return max(_MIN_DOCUMENT, size // _DOCUMENT_BASE64_PER_TOKEN)
    return None


def _detail(part: dict[str, Any]) -> object:
    url = part.get("image_url")
    return url.get("detail") if isinstance(url, dict) else part.get("detail")


def _base64_size(part: dict[str, Any]) -> int:
    """Return the characters of base64 in a part; 0 if its source is text or elsewhere."""
    source = part.get("source", part.get("file", part.get("input_audio", part)))
    if not isinstance(source, dict) or source.get("type") == "text":
        return 0
    return max((len(value) for key in ("data", "file_data") if isinstance(value := source.get(key), str)), default=0)
