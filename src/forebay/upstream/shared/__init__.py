"""One account for many processes: a ledger in a store, and the leases by which processes use it.

`ledger` decides, and is pure; `store` is the interface of what keeps ledgers, which runs one exchange as one step.
"""
