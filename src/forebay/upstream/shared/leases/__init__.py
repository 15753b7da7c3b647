"""The leases of a process on the ledgers of its accounts and budgets, and when it asks them."""
