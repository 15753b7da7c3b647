"""Supervision trees: workers are started in order, stopped in reverse, and started again when their lives end.

`restart_policy` and `restart_intensity` decide, without a clock; `worker_life` starts and stops one worker;
`supervision` awaits what was decided; `tree_node` is the snapshot. The semantics are those that Erlang/OTP documents
for its supervisors, except where ADR 30 says otherwise.
"""
