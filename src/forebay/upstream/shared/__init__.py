"""One account for many processes: a ledger in a store, and the leases by which processes use it.

`ledger` decides, and is pure; `leases` is the part of each process; `stores` keep ledgers, and run one exchange as one
step.
"""
