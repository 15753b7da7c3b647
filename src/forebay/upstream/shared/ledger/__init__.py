"""The ledger of a shared account: what processes report, and what each of them gets. Pure."""
