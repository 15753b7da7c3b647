"""``forebay overflow`` without a store that it can use."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from forebay.cli.app import app
from forebay.cli.text_table import one_line, text_table


@pytest.mark.parametrize(
    ("url", "status", "why"),
    [
        ("nonsense", 2, "it does not begin with the name of a store and ://"),
        ("mysql://host/db", 2, "there is no store 'mysql'"),
        ("memory://", 2, "an overflow in memory is seen by its process alone"),
        ("sqlite:///no/such/file.db", 1, "there is no file"),
    ],
)
@pytest.mark.parametrize(
    "command", [["ls"], ["count"], ["show", "ID"], ["replay", "--all"], ["purge", "--state", "dead"]]
)
def test_a_store_that_cannot_be_used_is_explained_in_a_line(
    command: list[str], url: str, status: int, why: str
) -> None:
    done = CliRunner().invoke(app, ["overflow", command[0], url, *command[1:]])
    assert done.exit_code == status
    assert done.stderr.startswith("forebay: ")
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_server_that_is_away_is_explained_without_the_password() -> None:
    done = CliRunner().invoke(app, ["overflow", "replay", "redis://user:hunter2@127.0.0.1:1/0", "--all"])
    assert (done.exit_code, done.stderr.startswith("forebay: "), "hunter2" in done.output) == (1, True, False)


def test_looking_into_a_file_that_does_not_exist_makes_none(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["overflow", "ls", f"sqlite:///{tmp_path}/spill.db"]).exit_code == 1
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_program_is_left_as_it_is(tmp_path: Path) -> None:
    (file := tmp_path / "notes.db").write_bytes(b"not a database" * 100)
    done = CliRunner().invoke(app, ["overflow", "purge", f"sqlite:///{file}", "--state", "dead", "--yes"])
    assert (done.exit_code, "not a SQLite database" in done.stderr) == (1, True)
    assert file.read_bytes() == b"not a database" * 100


def test_a_table_has_aligned_columns_and_no_empty_ones() -> None:
    assert text_table(("a", "b", "long title"), [("1", "", "x"), ("22", "", "y")]).splitlines() == [
        "A   LONG TITLE",
        "1   x",
        "22  y",
    ]


def test_a_text_is_cut_and_made_safe() -> None:
    assert one_line("a\tb\x1b[0m\nc") == "a\\tb\\x1b[0m\\nc"
    assert one_line("x" * 100, 10) == "xxxxxxx..."
