"""The number of updates that a fit with a given time has left."""

import time

from probdiff._checks import Whole


class Clock:
    """A clock that starts now, and plans updates for the time that is left from the time that each has taken so far.

    Args:
        seconds: The whole time.
        before: The seconds that were spent before.
    """

    def __init__(self, seconds: float, before: float) -> None:
        self.seconds: float = seconds
        self._start = time.monotonic() - before
        self._first: tuple[float, Whole] | None = None

    @property
    def spent(self) -> float:
        """Seconds spent so far."""
        return time.monotonic() - self._start

    def updates_left(self, done: Whole) -> int | None:
        """The number of further updates that there is time for, at least 1; None at the first call, because the updates before it include compilation."""
        if self._first is None:
            self._first = self.spent, done
            return None
        start, first = self._first
        each = (self.spent - start) / (done - first)
        return max(1, int((self.seconds - self.spent) / each))
