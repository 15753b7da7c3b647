"""Spill and refill: tasks out to the task store, back from it, and the leases on those of them that are inside.

A stored task leaves a process before its end in four ways, which have one name each wherever they occur:

- *release*: its ticket ends with StillSpilled, and its record stays for the next process;
- *requeue*: it is stopped and then released, so that the next process runs it again;
- *cancel*: it ends CANCELLED, in the store too;
- *abandon*: its handler is asked to stop, and nothing that it still does matters. The ticket does not end by that.
"""
