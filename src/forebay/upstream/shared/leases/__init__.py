"""What a process leases from the ledgers of its accounts and budgets, and when it asks them."""
