"""The end of a service that was started here: the processes of its session, once HAProxy has answered what it has.

Serve's own shutdown kills HAProxy first, with all that is in flight, and then drains replicas that nobody can reach.
"""

import contextlib
import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

# How long a stop may take to answer what was accepted, and how often it is looked how much that still is.
DRAIN_TIMEOUT_S, DRAIN_PERIOD_S = 60.0, 0.1
# After this long a cluster that is not this service's own is no longer asked to end it.
STOP_TIMEOUT_S = 30.0


def drain(session: int, stopping: list[int]) -> None:
    """Have HAProxy take no new connections, and wait until all requests that it has are answered.

    No longer than `DRAIN_TIMEOUT_S`, and not after a second signal.
    """
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    with contextlib.suppress(OSError):  # it ended meanwhile
        if admin := haproxy_admin(session):
            _tell(admin, "disable frontend http_frontend")
            while in_flight(admin) and len(stopping) < 2 and time.monotonic() < deadline:
                time.sleep(DRAIN_PERIOD_S)


def haproxy_admin(session: int) -> Path | None:
    """The socket at which the HAProxy of a session takes commands; None where there is none."""
    for process in _processes(session):
        with contextlib.suppress(psutil.Error):
            if process.name() == "haproxy":
                command = process.cmdline()
                return Path(command[command.index("-f") + 1]).with_name("admin.sock")
    return None


def in_flight(admin: Path) -> int:
    """Requests that HAProxy has sent on and not seen answered; raises OSError where it has gone."""
    lines = _tell(admin, "show stat").removeprefix("# ").splitlines()
    return sum(int(row["scur"]) for row in csv.DictReader(lines) if row["svname"] == "BACKEND")


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
            child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            print(f"serve: no clean stop within {STOP_TIMEOUT_S:.0f} s, ending it now", file=sys.stderr)
    # Not asked to end, for which they take twelve seconds: each waits for another, and there is nothing left to save.
    while processes := _processes(child.pid):
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=1)
    child.wait()


def _processes(session: int) -> list[psutil.Process]:
    """What runs of a session; Ray gives some processes, HAProxy among them, a group of their own."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
