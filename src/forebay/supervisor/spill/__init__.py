"""Spill and refill: tasks go out to the task store and come back, and this process holds leases on those inside it.

A stored task leaves a process before its end in four ways, each with one name everywhere:

- *release*: its ticket ends with StillSpilled, and its record stays for the next process;
- *requeue*: it is stopped and then released, so that the next process runs it again;
- *cancel*: it ends CANCELLED, in the store too;
- *abandon*: its handler is asked to stop, and its outcome no longer matters. The ticket does not end by that.
"""
