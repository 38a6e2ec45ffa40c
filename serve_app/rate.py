"""How fast work is done: by a replica that is never idle, and by all of them as one who waits for them sees it."""

import math
import time
from collections.abc import Callable

# Of the batches measured, those count that hold at least this share of the most that one may.
FULL_SHARE = 0.5
# Each batch moves the rate this far towards its own.
NEWEST_SHARE = 0.2
# Over how much of the last time a queue is watched, and from how much of that on it is believed.
WATCHED_S, BELIEVED_S = 5.0, 0.25


class Rate:
    """The rate of full batches: a queue is worked off in such, and many engines do small ones at a fraction of it.

    `try_out` gives a first value before the first call.
    """

    def __init__(self, full: int) -> None:
        """`full`: most work in one batch, in any unit."""
        self._full = full
        self._cost = self._seconds = 0.0
        self.ended = -math.inf  # of the last batch

    def try_out(self, cost: int, run: Callable[[], object]) -> None:
        """Run a batch of so much work twice and record the second: the first finds memory, and loads what it calls."""
        run()
        started = time.perf_counter()
        run()
        self.record(cost, started, time.perf_counter())

    def record(self, cost: int, started: float, ended: float) -> None:
        """A batch of so much work was done between these times, in seconds of one clock.

        Where batches overlap, each counts from the end of the one before it, as all share one engine.
        """
        seconds = ended - max(started, self.ended)
        self.ended = ended
        if cost >= self._full * FULL_SHARE:
            share = NEWEST_SHARE if self._seconds else 1.0
            self._cost += share * (cost - self._cost)
            self._seconds += share * (seconds - self._seconds)

    @property
    def per_s(self) -> float:
        """Work a second; 0.0 until a full batch was done.

        >>> rate = Rate(full=100)
        >>> rate.record(100, 0.0, 2.0), rate.record(5, 2.0, 3.0), rate.per_s
        (None, None, 50.0)
        """
        return self._cost / self._seconds if self._seconds > 0 else 0.0


class Pace:
    """How fast a queue is worked off: as was seen while more waited than was worked on, else as the workers say."""

    def __init__(self) -> None:
        self.told = 0.0  # work a second, by the workers; 0.0 while nothing is known
        self._cost = self._seconds = 0.0  # what was done, in how long; the older, the less it counts
        self._seen_at = -math.inf

    def record(self, cost: int, seconds: float, now: float) -> None:
        """So much was done in the last seconds, in which there always was more to do."""
        decay = math.exp(-min(now - self._seen_at, 10 * WATCHED_S) / WATCHED_S)
        self._cost = self._cost * decay + cost
        self._seconds = self._seconds * decay + seconds
        self._seen_at = now

    def wait_s(self, cost: int, now: float) -> float:
        """In how many seconds so much work will be done; 0.0 where nothing is known.

        >>> pace = Pace()
        >>> pace.told = 100.0
        >>> pace.wait_s(50, now=0.0), pace.record(50, seconds=1.0, now=1.0), pace.wait_s(50, now=2.0)
        (0.5, None, 1.0)
        """
        is_believed = self._seconds >= BELIEVED_S and now - self._seen_at < WATCHED_S
        per_s = self._cost / self._seconds if is_believed else self.told
        return cost / per_s if per_s else 0.0
