"""``forebay keys``: creates, lists, changes, rotates and revokes issued keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from forebay import clock
from forebay.cli.app import app
from forebay.gateway.callers.issued_keys import is_well_formed, key_digest
from forebay.gateway.callers.key_file import read_snapshot


class Command:
    """``forebay keys`` on a file of this test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"sqlite:///{path}"

    def __call__(self, command: str, *options: str) -> Result:
        return CliRunner().invoke(app, ["keys", command, self.url, *options])

    def json(self, command: str, *options: str) -> Any:
        done = self(command, *options, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)


@pytest.fixture
def keys(tmp_path: Path) -> Command:
    return Command(tmp_path / "keys.db")


def test_a_new_key_stands_alone_on_stdout_and_is_never_shown_again(keys: Command) -> None:
    created = keys("create", "writer", "--rpm", "60", "--model", "gpt-4o*")
    text = created.stdout.removesuffix("\n")
    assert created.exit_code == 0
    assert is_well_formed(text)
    assert "not shown again" in created.stderr
    for shown in (keys("list"), keys("list", "--json"), keys("show", "writer"), keys("show", "writer", "--json")):
        assert shown.exit_code == 0
        assert text not in shown.output
        assert text[:7] in shown.output
    snapshot = read_snapshot(keys.path, timeout=1.0)
    assert snapshot is not None
    assert list(snapshot.secrets) == [key_digest(text)]


def test_every_field_can_be_given_and_read_as_json(keys: Command) -> None:
    options = (
        *("--tenant", "acme", "--sets-tenant", "--priority", "low", "--max-priority", "high"),
        *("--budget-usd", "5.5", "--budget-per", "month", "--rpm", "60", "--tpm", "1000", "--max-concurrent", "4"),
        *("--model", "gpt-4o*", "--model", "o3", "--target", "openai", "--expires", "2100-01-31"),
    )
    created = keys.json("create", "writer", *options)
    assert is_well_formed(created.pop("key"))
    assert created == keys.json("show", "writer")
    assert created == {
        "name": "writer",
        "state": "active",
        "tenant": "acme",
        "sets_tenant": True,
        "priority": "low",
        "max_priority": "high",
        "budget_usd": 5.5,
        "budget_per": "month",
        "rpm": 60,
        "tpm": 1000,
        "max_concurrent": 4,
        "models": ["gpt-4o*", "o3"],
        "targets": ["openai"],
        "created_at": created["created_at"],
        "expires_at": 4_105_036_800.0,
        "revoked_at": None,
        "last_used": None,
        "secrets": created["secrets"],
    }


def test_the_table_has_what_a_key_may_do(keys: Command) -> None:
    options = ("--budget-usd", "5", "--rpm", "60", "--max-priority", "high", "--model", "o3", "--target", "openai")
    keys("create", "writer", *options)
    (line,) = keys("list").stdout.splitlines()[1:]
    for part in ("writer", "active", "normal, up to high", "5 USD per day", "60 rpm", "o3 at openai"):
        assert part in line


def test_a_time_from_now_is_an_expiry(keys: Command) -> None:
    created = keys.json("create", "writer", "--expires", "1.5h")
    assert created["expires_at"] == pytest.approx(created["created_at"] + 5400, abs=0.001)


def test_an_update_changes_what_is_given_and_no_more(keys: Command) -> None:
    keys("create", "writer", "--rpm", "60", "--model", "o3", "--expires", "30d")
    changed = keys.json("update", "writer", "--tpm", "1000", "--clear", "model", "--clear", "expires", "--disable")
    assert (changed["rpm"], changed["tpm"], changed["models"], changed["expires_at"]) == (60, 1000, [], None)
    assert changed["state"] == "disabled"
    assert keys.json("update", "writer", "--enable")["state"] == "active"
    assert "60 rpm, 1,000 tpm" in keys("update", "writer", "--tenant", "acme").stdout


def test_a_rotation_prints_another_key_and_says_how_long_the_one_before_is_valid(keys: Command) -> None:
    first = keys("create", "writer").stdout.strip()
    rotated = keys("rotate", "writer", "--grace", "2h")
    second = rotated.stdout.strip()
    assert is_well_formed(second)
    assert f"the one before ({first[:7]}...) is valid until" in rotated.stderr
    before, after = keys.json("show", "writer")["secrets"]
    assert (before["hint"], after["hint"]) == (first[:7], second[:7])
    assert before["valid_until"] == pytest.approx(clock.wall_time() + 7200, abs=600)
    assert "not any more" not in keys("show", "writer").stdout
    keys("rotate", "writer", "--grace", "0s")
    assert keys("show", "writer").stdout.count("not any more") == 2


def test_a_rotation_without_grace_says_that_the_key_before_is_not_valid(keys: Command) -> None:
    first = keys("create", "writer").stdout.strip()
    rotated = keys("rotate", "writer", "--grace", "0s")
    assert f"the one before ({first[:7]}...) is not valid any more" in rotated.stderr


def test_a_revoked_key_is_listed_only_if_all_are(keys: Command) -> None:
    keys("create", "writer")
    assert "is revoked" in keys("revoke", "writer").stdout
    assert keys("list").stdout == "no keys\n"
    assert [each["state"] for each in keys.json("list", "--all")] == ["revoked"]
    assert "revoked" in keys("show", "writer").stdout


@pytest.mark.parametrize(
    ("command", "status", "problem"),
    [
        (("create", "two words"), 2, "key was given name='two words'"),
        (("create", "other", "--rpm", "0"), 2, "key was given rpm=0; it must be a whole number of at least 1"),
        (("create", "other", "--budget-per", "day"), 2, "--budget-per is the period of --budget-usd"),
        (("create", "other", "--expires", "soon"), 2, "'soon' is neither a date, such as 2027-01-31, nor a number"),
        (("create", "other", "--expires", "2001-01-31"), 2, "2001-01-31 has passed"),
        (("create", "other", "--expires", "0d"), 2, "0d has passed"),
        (("create", "other", "--priority", "high", "--max-priority", "low"), 2, "at least as good as its priority"),
        (("create", "writer"), 1, "There is a key 'writer'"),
        (("update", "writer"), 2, "say what to change"),
        (("update", "writer", "--rpm", "1", "--clear", "rpm"), 2, "give --rpm or --clear rpm, not both"),
        (("create", "other", "--model", "gpt-4o,o3"), 2, "--model: give one at a time, and the option several times"),
        (("rotate", "writer", "--grace", "soon"), 2, "'soon' is not a time"),
        (("rotate", "reader"), 1, "There is no key 'reader'"),
        (("show", "reader"), 1, "There is no key 'reader'"),
        (("revoke", "reader"), 1, "There is no key 'reader'"),
    ],
)
def test_a_mistake_is_told_and_changes_nothing(
    keys: Command, command: tuple[str, ...], status: int, problem: str
) -> None:
    keys("create", "writer")
    before = keys.json("list")
    done = keys(*command)
    assert (done.exit_code, done.stdout) == (status, "")
    assert problem in " ".join(done.stderr.split())
    assert keys.json("list") == before


@pytest.mark.parametrize("command", [("list",), ("show", "x"), ("update", "x", "--rpm", "1"), ("rotate", "x")])
def test_only_create_makes_a_file(keys: Command, command: tuple[str, ...]) -> None:
    done = keys(*command)
    assert done.exit_code == 1
    assert "there is no such file" in done.stderr
    assert not keys.path.exists()


def test_a_url_of_another_store_is_told() -> None:
    done = CliRunner().invoke(app, ["keys", "list", "redis://:hidden@host/0"])
    assert done.exit_code == 2
    assert "kept in a SQLite file" in done.stderr
    assert "hidden" not in done.stderr
