"""The stores of ledgers: memory, SQLite and Redis."""
