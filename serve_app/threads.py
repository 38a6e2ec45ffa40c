"""Threads that give way to others."""

import math
import os
import sys
from concurrent.futures import Executor, ThreadPoolExecutor


def background(threads: int, share: float) -> Executor:
    """Threads that get this share of the processor while others want all of it; all of it while nobody does."""

    def step_back() -> None:
        if sys.platform == "linux":  # elsewhere niceness is the whole process's
            os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + niceness(share))

    return ThreadPoolExecutor(threads, "bulk", step_back)


def niceness(share: float) -> int:
    """How much nicer threads have to be to get this share beside others: each step is a factor of 1.25 (sched(7)).

    >>> niceness(0.5), niceness(0.1), niceness(0.001)
    (0, 10, 19)
    """
    return max(0, min(19, round(math.log((1 - share) / share, 1.25))))
