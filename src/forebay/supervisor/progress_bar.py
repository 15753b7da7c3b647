"""A progress bar for a fan-out, in the terminal, by rich."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forebay.errors import InvalidSetting

if TYPE_CHECKING:
    from forebay.supervisor.fan_out import FanOutProgress


def progress_bar(title: str = "tasks", **options: Any) -> ProgressBar:
    """Return a progress bar for ``fan_out(progress=...)`` or ``map(progress=...)``.

    Args:
        title: what stands before the bar.
        options: for ``rich.progress.Progress``, such as ``transient=True``.

    Raises:
        InvalidSetting: rich is not installed.
    """
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415
    except ImportError:
        expected = "used where rich is installed: pip install rich"
        raise InvalidSetting(owner="fan_out", name="progress", value="progress_bar()", expected=expected) from None
    failed = TextColumn("{task.fields[failed]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), failed)
    return ProgressBar(Progress(*columns, **options), title)


class ProgressBar:
    """A bar that shows how far a fan-out is, and how many of its tasks have failed. It ends with the last task."""

    def __init__(self, bars: Any, title: str) -> None:
        self._bars = bars
        self._bar = bars.add_task(title, total=None, failed="")
        self._started = False

    def __call__(self, state: FanOutProgress) -> None:
        """Show the state of the fan-out."""
        if not self._started:
            self._started = True
            self._bars.start()
        done = state.succeeded + state.failed
        failed = f"{state.failed} failed" if state.failed else ""
        self._bars.update(self._bar, completed=done, total=state.total, failed=failed)
        if done == state.total:
            self.close()

    def close(self) -> None:
        """Leave the terminal as it is now; for a fan-out that was left before its end."""
        self._bars.stop()
