"""Old names of arguments: the error gives the new name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from forebay._renamed import renamed_arguments


@renamed_arguments(old="new", gone="pass other= twice")
@dataclass(frozen=True)
class Thing:
    """A thing whose arguments were renamed."""

    new: int = 0


@renamed_arguments(old="new")
def function(*, new: int = 0) -> int:
    """Return `new`."""
    return new


def test_an_old_name_gives_the_new_one() -> None:
    with pytest.raises(TypeError, match=r"^Thing: old is now new$"):
        Thing(old=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^Thing has no gone: pass other= twice$"):
        Thing(gone=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^function: old is now new$"):
        function(old=1)  # type: ignore[call-arg]


def test_new_names_work() -> None:
    assert Thing(new=1) == Thing(1)
    assert function(new=2) == 2
