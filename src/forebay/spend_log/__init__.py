"""The spend log: what calls have cost, by hour, upstream, tenant, model and key, in a file that survives its process.

`spend_record` has the rows, `unwritten_spend` adds up what is not written yet, `spent_totals` what budgets begin with,
`spend_file` is the SQLite file, `write_behind` writes it behind the calls, and `spend_report` adds it up for people.
"""

from forebay.spend_log.spend_record import OTHER, SpendAmounts, SpendLabels
from forebay.spend_log.spend_report import COLUMNS, SpendQuery, read_spend
from forebay.spend_log.write_behind import SpendLog, parse_spend_log

__all__ = [
    "COLUMNS",
    "OTHER",
    "SpendAmounts",
    "SpendLabels",
    "SpendLog",
    "SpendQuery",
    "parse_spend_log",
    "read_spend",
]
