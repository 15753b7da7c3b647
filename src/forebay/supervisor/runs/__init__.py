"""Runs: one attempt at one task, from the slot that it takes to the moment its handler has really ended.

`run` is the state of one, `runner` steps its handler, `completion` ends it, `slot_loans` lends its slot while it awaits
a task, and `timers` are those of the whole supervisor.
"""
