"""Bugs of the gateway to be planted, each beside the test that catches it: see `plants`."""

from __future__ import annotations

from tests.mutants.plants import Mutant

_BODIES = "tests/acceptance/test_gateway_bodies.py::"
_ATTACKS, _GATEWAY = "tests/acceptance/test_gateway_attacks.py::", "tests/acceptance/test_gateway.py::"

MUTANTS = [
    # --- who gets in ---
    Mutant(
        "a name that was made to mean loopback is taken for it",
        "gateway/guard.py",
        "if host is not None and not",
        "if False and not",
        _ATTACKS + "test_a_web_page_from_elsewhere_gets_nothing",
    ),
    Mutant(
        "a page from anywhere may call",
        "gateway/guard.py",
        "if origin is not None and not",
        "if False and not",
        _ATTACKS + "test_a_web_page_from_elsewhere_gets_nothing",
    ),
    Mutant(
        "a path may leave what the target's URL says",
        "gateway/route.py",
        "    if not _is_plain(",
        "    if False and not _is_plain(",
        _ATTACKS + "test_what_is_not_below_a_target_is_nowhere",
    ),
    # --- bounds ---
    Mutant(
        "headers are bounded each and not together",
        "gateway/guard.py",
        "> self._most:",
        "> 10**9:",
        _ATTACKS + "test_headers_are_bounded_together_not_each",
    ),
    Mutant(
        "what is sent ahead of an answer is read without end",
        "gateway/server.py",
        "if ahead > self._most_head + _HEADERS:",
        "if False:",
        _BODIES + "test_who_sends_ahead_of_its_answers_is_not_read_beyond_a_head_but_answered_in_turn",
    ),
    Mutant(
        "who sent too much ahead is not read on when its turn has come",
        "gateway/server.py",
        '        cast("_Handler", request.protocol).look_ahead()  # its turn has come\n',
        "",
        _BODIES + "test_who_was_not_read_on_is_read_again_when_its_turn_has_come[True-POST /nowhere HTTP/1.1]",
    ),
    Mutant(
        "a head without end behind a call costs the call its answer",
        "gateway/server.py",
        "            if not waits:\n                self.close()",
        "            if False:\n                self.close()",
        _BODIES + "test_a_head_without_end_behind_a_call_is_not_read_on_and_the_call_is_answered",
    ),
    Mutant(
        "a head of many short lines may go on for ever",
        "gateway/server.py",
        "if self._head > self._most_head + _HEADERS:",
        "if False:",
        _ATTACKS + "test_a_head_without_end_is_not_read_on",
    ),
    Mutant(
        "an answer is unpacked whatever it unpacks to",
        "gateway/passage.py",
        '        if size > _MOST:\n            return b""',
        '        if False:\n            return b""',
        _ATTACKS + "test_an_answer_that_unpacks_to_more_than_is_held_passes_unread",
    ),
    Mutant(
        "what is too long to be held is asked for again",
        "gateway/passage.py",
        "tried.again = tried.again and not",
        "tried.again = tried.again or not",
        _ATTACKS + "test_an_answer_without_end_is_not_held",
    ),
    Mutant(
        "a caller that does not read keeps its socket past the end",
        "gateway/server.py",
        'cast("_Handler", handler).abort()',
        "pass",
        _ATTACKS + "test_who_does_not_read_holds_nothing_up_at_the_end",
    ),
    # --- what passes ---
    Mutant(
        "a redirect is followed with the caller's key",
        "gateway/outgoing.py",
        "allow_redirects=False",
        "allow_redirects=True",
        _ATTACKS + "test_nobody_is_followed_elsewhere_with_a_key",
    ),
    Mutant(
        "what Connection names goes on",
        "gateway/passage.py",
        'for name in b",".join(hop).decode("latin-1").split(",") if hop else ():',
        "for name in ():",
        _ATTACKS + "test_headers_of_one_hop_go_no_further",
    ),
    Mutant(
        "the gateway's own headers and its token go on",
        "gateway/passage.py",
        ' and not low.startswith("x-forebay-")',
        "",
        _ATTACKS + "test_keys_are_told_to_nobody_but_their_provider",
    ),
    Mutant(
        "headers are logged",
        "gateway/proxy.py",
        "        began = clock.now()\n",
        '        began = clock.now()\n        log.debug("%s", headers)\n',
        _ATTACKS + "test_keys_are_told_to_nobody_but_their_provider",
    ),
    Mutant(
        "an event of ours ends what is no stream of events",
        "gateway/passage.py",
        "        self.at_border = self._events\n",
        "        self.at_border = True\n",
        _ATTACKS + "test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one",
    ),
    # --- the end ---
    Mutant(
        "who is cut off before an answer is told nothing",
        "gateway/proxy.py",
        "            raise _draining(target.protocol) from None",
        "            raise ConnectionResetError from None",
        _GATEWAY + "test_what_does_not_end_is_cut_off_and_told_so",
    ),
    Mutant(
        "a stream that is cut off just ends",
        "gateway/proxy.py",
        "elif opened.at_border and not",
        "elif False and not",
        _GATEWAY + "test_what_does_not_end_is_cut_off_and_told_so",
    ),
    Mutant(
        "a gateway that drains says that all is well",
        "gateway/proxy.py",
        '"draining" if self.draining else "ok"',
        '"ok"',
        _GATEWAY + "test_at_the_end_calls_under_way_are_finished_and_who_comes_is_told",
    ),
    # --- what bodies take ---
    Mutant(
        "bodies are bounded each and not together",
        "gateway/bodies.py",
        "if self.held + more > self._together:",
        "if more > self._together:",
        _BODIES + "test_a_body_is_held_until_its_call_has_ended",
    ),
    Mutant(
        "what is announced is taken for there",
        "gateway/bodies.py",
        "        self._bodies.check(size, more=size)\n",
        "        self._bodies.check(size, more=size)\n        self._bodies.held += size\n        self._size += size\n",
        _BODIES + "test_what_was_announced_and_has_not_come_takes_nothing",
    ),
    Mutant(
        "a body whose sender hangs up is held for ever",
        "gateway/bodies.py",
        "        self._bodies.held -= self._size\n",
        "        self._bodies.held -= 0 if cause else self._size\n",
        _BODIES + "test_who_hangs_up_gives_its_body_back_whenever_that_is",
    ),
]
