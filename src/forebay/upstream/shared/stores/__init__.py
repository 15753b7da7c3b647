"""Where ledgers are kept: memory, SQLite and Redis."""
