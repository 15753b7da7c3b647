"""The limit of open files: raised where that is allowed, and never exceeded by connections."""

from __future__ import annotations

import logging
import resource

import pytest

from forebay.gateway import server
from forebay.gateway.file_limit import connections_within, fit_connections
from forebay.gateway.settings import GatewaySettings

DEFAULT = next(
    default
    for name, default in zip(
        reversed(GatewaySettings.__struct_fields__), reversed(GatewaySettings.__struct_defaults__), strict=False
    )
    if name == "max_connections"
)


class Limits:
    """The soft and the hard limit of open files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, *, fixed: bool = False) -> None:
        self.soft, self.hard, self.fixed = soft, hard, fixed
        monkeypatch.setattr(resource, "getrlimit", lambda _: (self.soft, self.hard))
        monkeypatch.setattr(resource, "setrlimit", self.set)

    def set(self, _: int, limits: tuple[int, int]) -> None:
        if self.fixed:
            raise ValueError("not allowed to raise maximum limit")
        assert limits[1] == self.hard
        self.soft = limits[0]


@pytest.mark.parametrize("files", [1, 16, 64, 256, 1024, 4096, 20_000, 65_536, 10**6])
@pytest.mark.parametrize("wanted", [1, 100, 10_000, 100_000])
def test_so_many_connections_never_need_more_files_than_there_are(files: int, wanted: int) -> None:
    fitting = connections_within(files, wanted)
    assert 1 <= fitting <= wanted
    assert 2 * fitting + min(100, files // 4) <= files or fitting == 1
    assert fitting == wanted or 2 * (fitting + 1) + 1_100 > files or files <= 4_400


@pytest.mark.parametrize(
    ("soft", "hard", "fits"),
    [
        (1024, 1_048_576, 10_000),
        (1024, resource.RLIM_INFINITY, 10_000),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 10_000),
        (1024, 4096, 1536),
        (256, 256, 96),
    ],
)
def test_the_limit_is_raised_as_far_as_needed_and_allowed(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, fits: int
) -> None:
    limits = Limits(monkeypatch, soft, hard)
    assert fit_connections(10_000, least=5_000) == fits
    assert resource.RLIM_INFINITY in (limits.soft, limits.hard) or limits.soft == min(hard, 21_100)


def test_a_limit_that_cannot_be_raised_lowers_the_connections(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Limits(monkeypatch, 1024, 4096, fixed=True)
    assert fit_connections(10_000, least=5_000) == 384
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "lowered from 10000 to 384, since this process may open 1024 files only" in record.message


def test_the_default_fits_in_20000_files_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    Limits(monkeypatch, 20_000, 20_000)
    assert fit_connections(DEFAULT, least=server._LEAST_CONNECTIONS) == 9450
    assert [record.levelno for record in caplog.records] == [logging.INFO]
