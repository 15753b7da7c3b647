"""The surge: fifty agents on one key and ten thousand tasks, first under a classic supervisor, then under Forebay."""
