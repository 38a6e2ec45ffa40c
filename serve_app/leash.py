"""`python leash.py PID`: ends all of its process group, itself included, once that process is gone."""

import os
import signal
import sys
import time

PERIOD_S = 1.0

if __name__ == "__main__":
    try:
        while True:
            os.kill(int(sys.argv[1]), 0)
            time.sleep(PERIOD_S)
    except ProcessLookupError:
        os.killpg(0, signal.SIGKILL)
