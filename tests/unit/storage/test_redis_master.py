"""The connection to a Redis master: how the master is found, and what is said where none is."""

from __future__ import annotations

from contextlib import closing

import pytest
from tests.support.redis_servers import HOST, SERVICE, free_port, redis_cluster, redis_sentinels, redis_server, shared

from forebay.errors import StoreUnavailable
from forebay.storage import parse_url, redis_master
from forebay.storage.redis_master import RedisMaster
from forebay.storage.redis_url import RedisUrl

NOBODY = f"{HOST}:1"  # nothing listens there


def url_of(text: str) -> RedisUrl:
    redis = parse_url(text).redis
    assert redis is not None
    return redis


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a call fail with the first attempt."""
    monkeypatch.setattr(redis_master, "_PATIENCE", 0.0)


def ask(text: str, *command: object, tag: str = "x") -> object:
    with closing(RedisMaster(url_of(text), tag)) as master:
        (answer,) = master.call(command)
        return answer


def test_commands_are_answered_in_their_order() -> None:
    with closing(RedisMaster(url_of(shared(redis_server).url), "x")) as master:
        assert master.call(("SET", "{x}:order", 1), ("INCR", "{x}:order"), ("GET", "{x}:order")) == [True, 2, b"2"]


def test_it_connects_again_after_it_was_closed() -> None:
    master = RedisMaster(url_of(shared(redis_server).url), "x")
    for _ in range(2):
        assert master.call(("PING",)) == [True]
        master.close()
    master.close()


def test_a_database_has_keys_of_its_own() -> None:
    text = shared(redis_server).url.removesuffix("/0")
    ask(f"{text}/3", "SET", "{x}:database", "3")
    assert ask(f"{text}/3", "GET", "{x}:database") == b"3"
    assert ask(f"{text}/0", "GET", "{x}:database") is None


def test_each_connection_is_prepared() -> None:
    master = RedisMaster(url_of(shared(redis_server).url), "x", prepare=[("CLIENT", "SETNAME", "prepared")])
    for _ in range(2):
        assert master.call(("CLIENT", "GETNAME")) == [b"prepared"]
        master.close()


def test_an_error_is_raised_although_other_commands_of_the_call_were_done() -> None:
    text = shared(redis_server).url
    with (
        closing(RedisMaster(url_of(text), "x")) as master,
        pytest.raises(StoreUnavailable, match="wrong number of arg"),
    ):
        master.call(("SET", "{x}:done", 1), ("GET",))
    assert ask(text, "GET", "{x}:done") == b"1"


def test_no_call_reads_the_answer_to_one_that_was_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(RedisMaster(url_of(shared(redis_server).url), "x")) as master:
        master.call(("PING",))
        with monkeypatch.context() as broken:
            broken.setattr(redis_master, "_answer", _run_out_of_memory)
            with pytest.raises(MemoryError):
                master.call(("DEBUG", "SLEEP", 0.2))  # so its answer is not there yet at the next call
        assert master.call(("ECHO", "mine")) == [b"mine"]


def _run_out_of_memory(*_: object) -> None:
    raise MemoryError


# --- Sentinels -------------------------------------------------------------------------------------------------------


def test_the_master_is_found_by_any_sentinel_that_answers() -> None:
    setup = shared(redis_sentinels)
    text = f"redis+sentinel://{NOBODY},{setup.sentinels[1]}/{SERVICE}"
    assert ask(text, "SET", "{x}:sentinel", 1) is True
    assert setup.master().ask("GET", "{x}:sentinel") == "1"


def test_a_service_that_no_sentinel_knows_is_reported() -> None:
    text = f"redis+sentinel://{shared(redis_sentinels).sentinels[0]}/nobody"
    with pytest.raises(StoreUnavailable, match=r"/nobody/0 cannot be used: nobody names a master"):
        ask(text, "PING")


def test_sentinels_that_are_away_are_reported() -> None:
    with pytest.raises(StoreUnavailable, match="connection refused"):
        ask(f"redis+sentinel://{NOBODY}/{SERVICE}", "PING")


def test_a_sentinel_gets_the_password_of_the_master_only_if_it_asks_for_one() -> None:
    with redis_sentinels() as setup:
        for sentinel in setup.sentinels:
            sentinel.ask("SENTINEL", "SET", SERVICE, "AUTH-PASS", "secret")
        for server in setup.servers:
            server.ask("CONFIG", "SET", "masterauth", "secret", "requirepass", "secret")
            server.options["requirepass"] = "secret"  # for the clients of this test
        one, other = setup.sentinels[:2]
        other.ask("ACL", "SETUSER", "default", ">secret")
        for sentinel in (one, other):
            assert ask(f"redis+sentinel://:secret@{sentinel}/{SERVICE}", "PING") is True
            with pytest.raises(StoreUnavailable, match="rejected the user or the password") as caught:
                ask(f"redis+sentinel://:wrong@{sentinel}/{SERVICE}", "PING")
            assert "wrong" not in str(caught.value)


# --- clusters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["a", "b", "c", "d", "e", "f"])
def test_the_master_of_a_tag_is_found_by_any_node_that_answers(tag: str) -> None:
    setup = shared(redis_cluster)
    text = f"redis+cluster://{NOBODY},{setup.servers[-1]}"
    assert ask(text, "SET", f"{{{tag}}}:cluster", 1, tag=tag) is True
    assert setup.master(tag).ask("GET", f"{{{tag}}}:cluster") == "1"


def test_a_node_that_has_other_keys_is_reported_with_the_form_to_use() -> None:
    setup = shared(redis_cluster)
    others = [server for server in setup.servers[:3] if server is not setup.master("x")]
    with pytest.raises(StoreUnavailable, match=r"node of a cluster.*redis\+cluster://"):
        ask(f"redis://{others[0]}", "SET", "{x}:moved", 1)


def test_a_server_that_is_no_cluster_is_reported() -> None:
    with pytest.raises(StoreUnavailable, match="not in a cluster"):
        ask(f"redis+cluster://{shared(redis_server).servers[0]}", "PING")


def test_a_port_where_nothing_listens_is_reported_at_once() -> None:
    with pytest.raises(StoreUnavailable, match="connection refused"):
        ask(f"redis://{HOST}:{free_port()}", "PING")
