"""The surge: fifty agents on one key and ten thousand tasks, without Forebay and with it."""
