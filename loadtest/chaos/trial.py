"""One fault done to a service under load, and the wait until all is as before."""

import math
import time

from loadtest.chaos.faults import Fault
from loadtest.chaos.load import Load
from loadtest.chaos.service import POLL_PERIOD_S, Service
from loadtest.chaos.tally import is_normal, limit_s

# Requests before the first fault: until all is warm, and then those that say what is usual.
WARM_UP_S, CALM_S = 5.0, 8.0
# The last seconds that have to be as usual, and how long that is waited for.
WINDOW_S = 3.0
RECOVERY_TIMEOUT_S = 100.0
# Requests before the next fault that still count to this one, beyond those of the window.
AFTER_S = 1.0


def calm(load: Load) -> float:
    """Wait until all is warm; the p99 up to which it is as usual."""
    time.sleep(WARM_UP_S + CALM_S)
    usual_s = limit_s(load.since(time.monotonic() - CALM_S))
    print(f"chaos: usual is a p99 of up to {usual_s:.2f} s", flush=True)
    return usual_s


def once(fault: Fault, service: Service, load: Load, usual_s: float) -> float:
    """Do a fault once, and wait until all is as before; seconds from the one to the other, infinite if it never is."""
    started = time.monotonic()
    gone = fault.act(service)
    whole_s = math.inf
    while time.monotonic() - started < RECOVERY_TIMEOUT_S:
        time.sleep(POLL_PERIOD_S)
        if math.isinf(whole_s) and service.is_whole(gone):
            whole_s = time.monotonic() - started
        window = time.monotonic() - WINDOW_S
        if math.isfinite(whole_s) and window > started and is_normal(load.since(window), load.waiting_s(), usual_s):
            time.sleep(AFTER_S)
            return max(whole_s, window - started)
    return math.inf
