"""The end of a service that was started here: the processes of its session, once HAProxy has answered what it has.

Serve's own shutdown kills HAProxy first, with all that is in flight, and then drains replicas that nobody can reach.
"""

import contextlib
import csv
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

# How often it is looked whether all is answered, and for how many looks in a row it must be.
LOOK_PERIOD_S, LOOKS = 0.1, 2
# What comes sooner after the first signal is the same one: `make` hands on one that the whole process group got.
SAME_SIGNAL_S = 1.0
# Both would start HAProxy anew, with its port open, or have it read a new configuration.
KEEPERS = ("ray::ServeController", "ray::HAProxyManager")
# How long Serve may take to withdraw the service from a cluster that is not its own, and processes to die.
WITHDRAW_TIMEOUT_S, KILL_TIMEOUT_S = 30.0, 10.0


def drain(session: int, stopping: Sequence[float], timeout_s: float) -> None:
    """Have HAProxy take no new connections, and wait until all requests that it has are answered.

    `stopping` are the times (`time.monotonic()` seconds) at which a signal came; with a second one the wait is over.
    What a process has that a reload of HAProxy replaced is not seen, and so not waited for.
    """
    for process in _processes(session):
        with contextlib.suppress(psutil.Error):
            if process.name() in KEEPERS:
                process.suspend()
    deadline = time.monotonic() + timeout_s
    looks, waiting = 0, -1
    while looks < LOOKS and (admin := haproxy_admin(session)):
        with contextlib.suppress(OSError):  # a reload is under way, or the machine is busy
            # The first has the kernel refuse connections, the second kept ones closed after their next answer. The
            # second alone leaves the socket listening, as HAProxy might have to hand it on.
            _tell(admin, "disable frontend http_frontend; shutdown frontend http_frontend")
            is_first, waiting = waiting < 0, in_flight(admin)
            looks = 0 if waiting else looks + 1
            if is_first and waiting:
                print(f"serve: answering {waiting} requests; a second signal ends it at once", flush=True)
        if stopping[-1] - stopping[0] > SAME_SIGNAL_S or time.monotonic() > deadline:
            unanswered = "an unknown number of" if waiting < 0 else waiting  # HAProxy never said
            print(f"serve: ended with {unanswered} requests unanswered", file=sys.stderr)
            return
        time.sleep(LOOK_PERIOD_S)


def haproxy_admin(session: int) -> Path | None:
    """The socket at which the HAProxy of a session takes commands; None where there is none."""
    for process in _processes(session):
        with contextlib.suppress(psutil.Error, OSError, ValueError):  # it has just ended
            if process.name() == "haproxy":
                command = process.cmdline()
                written = Path(command[command.index("-f") + 1]).read_text()
                if found := re.search(r"^\s*stats socket (\S+)", written, re.MULTILINE):
                    return Path(found[1])
    return None


def in_flight(admin: Path) -> int:
    """Requests that HAProxy has and that are not answered; raises OSError where it does not say."""
    lines = _tell(admin, "show stat").removeprefix("# ").splitlines()
    counts = [int(row["scur"]) for row in csv.DictReader(lines) if row["svname"] == "BACKEND"]
    if not counts:
        raise OSError(f"HAProxy at {admin} names no backend")
    return sum(counts)


def _tell(admin: Path, command: str) -> str:
    """HAProxy's answer to a command (https://docs.haproxy.org/2.8/management.html#9.3)."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1)
        connection.connect(str(admin))
        connection.sendall(command.encode() + b"\n")
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def stop(child: subprocess.Popen[bytes]) -> None:
    """End a process and all of its session. From a cluster that is not its own Serve withdraws the service first."""
    if "RAY_ADDRESS" in os.environ and child.poll() is None:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(WITHDRAW_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            print(f"serve: no clean stop within {WITHDRAW_TIMEOUT_S:.0f} s, ending it now", file=sys.stderr)
    # Not asked to end, for which they take twelve seconds: each waits for another, and there is nothing left to save.
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while (processes := _processes(child.pid)) and time.monotonic() < deadline:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=1)
    if processes:
        print(f"serve: these processes can't be ended: {[process.pid for process in processes]}", file=sys.stderr)
    child.poll()


def _processes(session: int) -> list[psutil.Process]:
    """What runs of a session; Ray gives some processes, HAProxy among them, a group of their own."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
