"""Bugs to be planted, one at a time, in a copy of the package: a few words changed in one place of one file.

Beside each stands the test that catches it. Its assertion must be what fails: a mutant that cannot be imported, or
whose words are no longer there, proves nothing, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass

_ACCEPTANCE, _CONTRACT, _UNIT = "tests/acceptance/", "tests/contract/", "tests/unit/"


@dataclass(frozen=True)
class Mutant:
    """A planted bug.

    Attributes:
        name: what it does wrong.
        path: the file below ``src/forebay``.
        old: words that stand there once.
        new: what takes their place.
        caught_by: the test, as pytest names it.
    """

    name: str
    path: str
    old: str
    new: str
    caught_by: str


_BEGUN = "tests/acceptance/test_begun_in_time.py::"

MUTANTS = [
    # --- slots and permits ---
    Mutant(
        "a slot that comes in the turn in which its caller is cancelled leaks",
        "supervisor/slot.py",
        "if self._run is not None:  # granted in the same turn of the loop",
        "if False:",
        _ACCEPTANCE + "test_slot.py::test_a_caller_cancelled_in_the_very_turn_in_which_the_slot_came_gives_it_back",
    ),
    Mutant(
        "a slot leaks when its handler is cancelled",
        "supervisor/endings.py",
        "        if run.holds:\n",
        "        if run.holds and not isinstance(cause, asyncio.CancelledError):\n",
        _ACCEPTANCE + "test_ending.py::test_a_handler_that_stops_at_its_timeout_gives_its_slot_at_once",
    ),
    Mutant(
        "a zombie gives its slot back",
        "supervisor/endings.py",
        "        run.worker.zombies += 1\n",
        "        run.worker.zombies += 1\n        house.give(run)\n",
        _ACCEPTANCE + "test_ending.py::test_a_zombie_keeps_its_slot_and_its_place_in_the_load_until_it_really_ends",
    ),
    Mutant(
        "a worker takes one more than its slots",
        "supervisor/worker.py",
        "if self.failed or self.returning or self.current_tasks >= self.max_concurrent:",
        "if self.failed or self.returning or self.current_tasks > self.max_concurrent:",
        _ACCEPTANCE + "test_routing.py::test_no_worker_ever_holds_more_than_its_slots",
    ),
    Mutant(
        "an await between the check and the take",
        "supervisor/admit.py",
        "        if overflow is None or not (task.spill or task.durable):\n",
        "        await asyncio.sleep(0)\n        if overflow is None or not (task.spill or task.durable):\n",
        _ACCEPTANCE + "test_bad_input.py::test_two_tasks_of_one_id_at_the_same_moment",
    ),
    Mutant(
        "a run that awaits its child keeps its slot",
        "supervisor/lend.py",
        "if run.lends and run.holds:",
        "if False:",
        _ACCEPTANCE + "test_nested.py::test_parents_and_children_that_share_one_slot_come_through",
    ),
    Mutant(
        "a run goes on without the slot that it lent",
        "supervisor/lend.py",
        "        if self._awaiting.lacks_slot:\n            await _regain(self._awaiting)",
        "        pass",
        _ACCEPTANCE + "test_nested.py::test_a_lent_slot_comes_back_before_its_run_goes_on",
    ),
    Mutant(
        "a waiter is entered after its task has ended",
        "supervisor/ticket.py",
        "if self._outcome is None:  # the slot",
        "if True:  # the slot",
        _ACCEPTANCE + "test_nested.py::test_who_awaits_a_task_that_ends_as_its_own_slot_is_lent_does_not_wait_for_ever",
    ),
    # --- endings ---
    Mutant(
        "a task is completed twice",
        "overflow/sqlite.py",
        "fence IS column2 AND state < 2",
        "fence IS column2",
        _CONTRACT + "test_ledger.py::test_it_ends_once[sqlite]",
    ),
    Mutant(
        "what a zombie returns is taken for its result",
        "supervisor/endings.py",
        "success = cause is None and run.abandoned_at is None",
        "success = cause is None",
        _ACCEPTANCE + "test_ending.py::test_what_a_zombie_returns_changes_nothing",
    ),
    Mutant(
        "the timer of a run is never cancelled",
        "supervisor/endings.py",
        "            self._house.timers.cancel(run.timer)\n            run.timer = None",
        "            run.timer = None",
        _ACCEPTANCE + "test_ending.py::test_a_handler_that_has_stopped_is_not_called_a_zombie_later",
    ),
    Mutant(
        "a cancelled timer fires",
        "supervisor/timers.py",
        "        if timer[_CALLBACK] is not None:\n            timer[_CALLBACK] = timer[_ARGUMENTS] = None\n",
        "        if timer[_CALLBACK] is not None:\n",
        _UNIT + "supervisor/test_timers.py::test_a_cancelled_timer_does_not_fire",
    ),
    Mutant(
        "a deadline is not inherited",
        "supervisor/admit.py",
        "if parent is not None and parent.deadline is not None:",
        "if False:",
        _ACCEPTANCE + "test_nested.py::test_a_child_inherits_the_earlier_of_its_parents_deadline_and_its_own",
    ),
    Mutant(
        "a timeout is no fault of the worker's",
        "supervisor/endings.py",
        "Outcome.FAULT if status is TaskStatus.TIMED_OUT else Outcome.IGNORED",
        "Outcome.IGNORED",
        _ACCEPTANCE + "test_workers.py::test_timeouts_count_as_failures_and_cancellations_do_not",
    ),
    Mutant(
        "the next of a thread never has its turn",
        "supervisor/endings.py",
        "if task.thread is not None and ticket.run is None:",
        "if False:",
        _ACCEPTANCE + "test_submitting.py::test_tasks_of_a_thread_run_one_at_a_time_in_order",
    ),
    Mutant(
        "draining forgets the line",
        "supervisor/drain.py",
        "        return [ticket for ticket in tickets if ticket.status is not TaskStatus.SPILLED]",
        "        return [ticket for ticket in tickets if ticket.status is TaskStatus.RUNNING]",
        _ACCEPTANCE + "test_life.py::test_draining_keeps_inside_what_may_not_spill",
    ),
    # --- the line ---
    Mutant(
        "a priority inversion",
        "admission/line.py",
        "next(rung for rung, length in enumerate(lengths) if length)",
        "max(rung for rung, length in enumerate(lengths) if length)",
        _ACCEPTANCE + "test_routing.py::test_the_line_is_served_by_priority_then_deadline_then_turn",
    ),
    Mutant(
        "LOW starves",
        "admission/line.py",
        "if passed >= self._floor)",
        "if passed < 0)",
        _ACCEPTANCE + "test_routing.py::test_low_moves_under_a_flood_of_critical",
    ),
    Mutant(
        "a task that waits is lost when another leaves",
        "admission/line.py",
        "        place[_ITEM] = None\n        self._shorten(place[_RUNG])\n        self._dead += 1\n",
        "        place[_ITEM] = None\n        self._queues[place[_RUNG]].pop()\n        self._shorten(place[_RUNG])\n",
        _ACCEPTANCE + "test_ending.py::test_cancelling_a_waiting_task_takes_it_out_of_the_line_at_once",
    ),
    # --- the gate ---
    Mutant(
        "a load at the threshold is let in",
        "admission/gate.py",
        "return load >= self",
        "return load > self",
        _UNIT + "admission/test_gate.py::test_it_refuses_from_its_load_on_and_not_below",
    ),
    Mutant(
        "retry_after is the same for everybody",
        "admission/seats.py",
        "        self._next = max(self._next, now) + 1 / (_CAUTION * drain_rate)\n",
        "        self._next = now + 1 / (_CAUTION * drain_rate)\n",
        _ACCEPTANCE
        + "test_submitting.py::test_no_two_refusals_get_the_same_retry_after_and_they_come_one_drain_interval_apart",
    ),
    Mutant(
        "an estimate locks the door",
        "admission/feasibility.py",
        "if self._last is None or now - self._last >= self._period:",
        "if False:",
        _ACCEPTANCE + "test_submitting.py::test_a_slow_spell_does_not_lock_the_door",
    ),
    # --- the breaker ---
    Mutant(
        "a probe is not given back",
        "breaker/breaker.py",
        "            self._out -= 1\n            if outcome is _FAULT:",
        "            if outcome is _FAULT:",
        _UNIT + "breaker/test_breaker.py::test_a_cancelled_probe_is_given_back_and_says_nothing",
    ),
    Mutant(
        "a zombie's end revives a worker that has failed",
        "supervisor/endings.py",
        "worker.stuck = self.trip(",
        "worker.stuck = True or self.trip(",
        _ACCEPTANCE
        + "test_workers.py::test_a_worker_that_failed_by_its_timeouts_stays_so_when_the_last_handler_stops_at_last",
    ),
    # --- the overflow ---
    Mutant(
        "fresh work overtakes what waits outside",
        "supervisor/admit.py",
        "if may_spill and pool.held_outside(priority):",
        "if False:",
        _ACCEPTANCE + "test_overflow.py::test_nothing_overtakes_what_waits_outside",
    ),
    Mutant(
        "a lease without a fence",
        "overflow/sqlite.py",
        "WHERE task_id = column1 AND fence IS column2 AND state < 2",
        "WHERE task_id = column1 AND state < 2",
        _CONTRACT + "test_ledger.py::test_a_lost_lease_may_do_nothing[sqlite]",
    ),
    Mutant(
        "a row is acknowledged before its commit",
        "overflow/sqlite.py",
        "return await self._writer.run_batched(self._put, (row, fence, until))",
        "self._writer.run_batched(self._put, (row, fence, until))\n        return Put.STORED",
        _UNIT + "overflow/test_sqlite_ledger.py::test_what_was_acknowledged_is_committed",
    ),
    Mutant(
        "seats that were reserved are not given back",
        "supervisor/intake.py",
        "pool.reserved -= seats",
        "pass",
        _ACCEPTANCE + "test_overflow.py::test_what_a_full_house_refuses_is_spilled_and_runs_later",
    ),
    Mutant(
        "a task starts on a lease that has lapsed",
        "supervisor/dispatch.py",
        "if self.overflow is not None and not self.overflow.may_start(ticket):",
        "if False:",
        _ACCEPTANCE + "test_shared_overflow.py::test_a_task_behind_its_thread_does_not_start_once_its_lease_has_lapsed",
    ),
    Mutant(
        "leases are not renewed",
        "supervisor/leases.py",
        "ledger.renew([each.lease for each in held], until=until)}",
        "()}",
        _ACCEPTANCE + "test_overflow.py::test_a_long_task_keeps_its_lease_also_while_the_house_drains",
    ),
    Mutant(
        "a key is forgotten while its work is under way",
        "supervisor/admit.py",
        "        return self._keys.get(key)\n",
        "        return None\n",
        _ACCEPTANCE + "test_submitting.py::test_a_task_that_is_submitted_twice_under_its_key_is_one_task",
    ),
    Mutant(
        "a row that comes back is begun beside its own run",
        "supervisor/intake.py",
        "elif ticket is not None and self._is_inside(ticket):",
        "elif False:",
        _ACCEPTANCE
        + "test_shared_overflow.py::test_a_lost_row_that_comes_back_while_its_task_still_runs_is_not_begun_again",
    ),
    Mutant(
        "a task whose store fails as the house drains is lost",
        "supervisor/drain.py",
        "            self._house.enter(ticket, pool, self._house.start_gate.pick(pool, ticket.task.priority))\n",
        "            pass\n",
        _ACCEPTANCE + "test_shared_overflow.py::test_what_cannot_be_stored_as_the_house_drains_runs_to_its_end_inside",
    ),
    Mutant(
        "a start is not counted",
        "supervisor/refill.py",
        "held = await self.ledger.start(lease)",
        "held = True",
        _ACCEPTANCE + "test_leases.py::test_a_start_is_on_record_before_its_handler_runs",
    ),
    # --- limits ---
    Mutant(
        "a refusal of an earlier epoch lowers the limit again",
        "limit/adaptive.py",
        "        if grant.epoch != self._epoch:\n            return\n        self._refusals += 1\n",
        "        self._refusals += 1\n",
        _CONTRACT + "test_limit.py::test_refusals_of_one_epoch_are_answered_once",
    ),
    Mutant(
        "every refusal is believed",
        "limit/noise.py",
        "return self._evidence >= (",
        "return True or (",
        _UNIT + "limit/test_adaptive.py::test_stray_refusals_do_not_lower_it",
    ),
    Mutant(
        "what convinced becomes background",
        "limit/noise.py",
        "        self._refusals += 1\n        self._evidence",
        "        self._refusals += 1\n        self.background += 0.005\n        self._evidence",
        _UNIT + "limit/test_noise.py::test_what_convinced_is_no_background",
    ),
    Mutant(
        "a trial without answers never ends",
        "limit/trial.py",
        "and now - self._began > _PATIENCE",
        "and now < self._began",
        _UNIT + "limit/test_adaptive.py::test_a_trial_without_answers_is_given_up",
    ),
    Mutant(
        "a slow-down is given no time to pass",
        "limit/trial.py",
        "if held and now - self._began < _PASSES:",
        "if held and now < self._began:",
        _UNIT + "limit/test_adaptive.py::test_a_slow_down_that_passes_is_waited_for",
    ),
    Mutant(
        "what passed in a trial is taken for ours",
        "limit/trial.py",
        "self._passed = held and",
        "self._passed = False and",
        _UNIT + "limit/test_adaptive.py::test_a_slow_down_that_passes_in_a_trial_leaves_nothing_behind",
    ),
    Mutant(
        "what was learned under a flood is believed",
        "limit/trial.py",
        "(middle > _SLOW or self._doubtful(middle))",
        "middle > _SLOW",
        _UNIT + "limit/test_adaptive.py::test_what_was_learned_under_a_flood_is_not_believed",
    ),
    Mutant(
        "a provider that shares is waited for like one that refuses",
        "limit/memory.py",
        "        self.ceiling = level\n        self._refuses = False\n",
        "        self.ceiling = level\n",
        _UNIT + "limit/test_adaptive.py::test_one_that_shares_is_not_waited_for",
    ),
    Mutant(
        "acceptances raise the limit in a trial",
        "limit/adaptive.py",
        "        if self._trial.stage is not Stage.WATCHING:\n            return  # else",
        "        if self._trial.stage is None:\n            return  # else",
        _UNIT + "limit/test_adaptive.py::test_nothing_raises_it_in_a_trial",
    ),
    Mutant(
        "who is slow by expectation never probes",
        "limit/probe.py",
        "(0.0 if brisk else _UNSURE)",
        "(0.0 if brisk else 1e9)",
        _UNIT + "limit/test_adaptive.py::test_an_expectation_that_is_too_short_does_not_keep_it_down",
    ),
    # --- what a handler sees ---
    Mutant(
        "a handler's context reaches the next",
        "supervisor/runner.py",
        "_step(run, crew.surroundings.copy())",
        "_step(run, crew.surroundings)",
        _ACCEPTANCE + "test_ending.py::test_what_a_task_writes_into_its_context_no_other_task_reads",
    ),
    # --- retries, and what is known of providers ---
    Mutant(
        "retries are not taken from the budget",
        "retry/budget.py",
        "        self._retries += 1\n",
        "        self._retries += slot[2] == 10\n",
        _UNIT + "retry/test_budget.py::test_what_was_taken_comes_back_when_its_window_has_passed",
    ),
    Mutant(
        "an old surplus funds a storm of retries",
        "retry/budget.py",
        "self._first -= int(first)",
        "self._first -= 0 * int(first)",
        _UNIT + "retry/test_budget.py::test_an_old_surplus_funds_no_storm",
    ),
    Mutant(
        "those who were told the same come back as a herd",
        "retry/backoff.py",
        "_SPREAD * asked",
        "0.0 * asked",
        _UNIT
        + "retry/test_backoff.py::"
        + "test_what_the_provider_asks_for_is_waited_and_those_who_were_told_the_same_come_back_apart",
    ),
    Mutant(
        "an event that is split between CR and LF ends twice",
        "upstream/rules/sse.py",
        'self._after_cr = piece.endswith(b"\\r")',
        "self._after_cr = False",
        _UNIT + "upstream/rules/test_meter.py::test_lines_split_within_their_ends_are_one",
    ),
    Mutant(
        "a caller that had not asked gets half of the usage's chunk",
        "upstream/rules/include_usage.py",
        "elif not self._dropped:",
        "else:",
        _UNIT + "upstream/rules/test_include_usage.py::test_the_end_of_a_chunk_that_was_kept_back_is_kept_back_too",
    ),
    Mutant(
        "what came from a cache counts against a quota that leaves it out",
        "upstream/rules/table.py",
        "usage.input_tokens - usage.cache_read_tokens",
        "usage.input_tokens",
        _UNIT + "upstream/rules/test_request.py::test_anthropic_charges_uncached_input_and_what_is_made",
    ),
    Mutant(
        "a task may wait until hardly any other would fit into the rest of its time",
        "supervisor/pool.py",
        "        if wait > times.bearable(remaining):",
        "        if False:",
        _BEGUN + "test_a_task_is_refused_whose_wait_would_leave_too_little_for_nearly_any",
    ),
    Mutant(
        "a task is begun that will hardly make it, while others wait who would",
        "supervisor/dispatch.py",
        "time = deadline.at - ticket.came_at if ticket.came_at is not None and pool.contested else None",
        "time = None",
        _BEGUN + "test_one_that_hardly_has_time_left_is_not_begun_before_others_who_have",
    ),
    Mutant(
        "a task that was cut off at its deadline is forgotten",
        "supervisor/endings.py",
        "house.pools[run.task.task_type].times.cut_off(house.loop.time() - run.began_at)",
        "pass",
        _BEGUN + "test_what_was_cut_off_at_its_deadline_is_known_to_take_longer",
    ),
    Mutant(
        "a task that comes back from outside is begun however little time it has",
        "supervisor/intake.py",
        "elif (error := self._house.too_late(ticket, pool)) is not None:",
        "elif (error := None) is not None:",
        "tests/sim/test_in_time.py::test_tasks_are_begun_in_time_or_not_at_all",
    ),
]
