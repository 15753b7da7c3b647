"""The part of a mistyped URL that a message may show: nothing that could be a password."""

from __future__ import annotations

import re

_HIDDEN = "***"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+]{0,19}:/*")
_FILE = re.compile(r"(?:sqlite|memory):/{3,}", re.IGNORECASE)  # a path follows, which may have an @
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
_PATH = re.compile(r"[A-Za-z0-9._/-]*")
_NAME = re.compile(r"[a-z_]{1,20}")
_VALUE = re.compile(r"[A-Za-z0-9._/:-]{0,100}")
_PUBLIC_OPTIONS = frozenset({"bound", "name", "replicas", "fsync", "endpoint", "region", "create"})


def shown_url(url: str) -> str:
    """Return `url` with asterisks for whatever could be a password."""
    url = url.strip()
    before_at, at, rest = url.rpartition("@")
    if at and not _FILE.match(url):
        scheme = _shown_scheme(url)
        # An option may have the password, or a ? or # be in it: then it is not known where it ends.
        return scheme + _HIDDEN if {"?", "#"} & set(before_at) else f"{scheme}{_HIDDEN}@{_shown_place(rest)}"
    if file := _FILE.match(url):
        path, mark, options = url[file.end() :].partition("?")
        return file[0] + path + mark + _shown_options(options)
    scheme = _shown_scheme(url)
    if scheme.endswith("//"):
        return scheme + _shown_place(url[len(scheme) :])
    rest = url[len(scheme) :]
    return scheme + (rest if _PATH.fullmatch(rest) and not scheme else _HIDDEN if rest else "")


def shown_value(text: str) -> str:
    """Return the value of an option, or asterisks if it could be a password."""
    return text if _VALUE.fullmatch(text) else _HIDDEN


def shown_option(name: str) -> str:
    """Return the name of an option, or asterisks if it could be a password."""
    return name if _NAME.fullmatch(name) else _HIDDEN


def _shown_scheme(url: str) -> str:
    """Return the scheme and what separates it; before a mere colon there could be a user."""
    found = _SCHEME.match(url)
    return "" if found is None or not ("/" in found[0] or found[0].lower() in _BARE) else found[0]


_BARE = frozenset({"redis:", "rediss:", "sqlite:", "memory:", "sqs:"})


def _shown_place(text: str) -> str:
    """Return what follows the scheme, or the @: hosts, a path and options."""
    text, mark, options = text.partition("?")
    hosts, slash, path = text.partition("/")
    shown = ",".join(each if not each or _HOST.fullmatch(each) else _HIDDEN for each in hosts.split(","))
    return shown + slash + (path if _PATH.fullmatch(path) else _HIDDEN) + mark + _shown_options(options)


def _shown_options(text: str) -> str:
    return "&".join(map(_shown_pair, text.split("&"))) if text else ""


def _shown_pair(text: str) -> str:
    name, is_equal, value = text.partition("=")
    if not is_equal:
        return _HIDDEN
    return f"{shown_option(name)}={shown_value(value) if name in _PUBLIC_OPTIONS else _HIDDEN}"
