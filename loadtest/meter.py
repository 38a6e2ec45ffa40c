"""CPU seconds and memory of a system's processes, read from outside."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil

SAMPLE_PERIOD_S = 1.0
# Idle is under this share of a core over this long; a system that never is gets measured all the same.
IDLE_SHARE = 0.3
IDLE_WINDOW_S = 0.3
IDLE_TIMEOUT_S = 20.0

Role = Callable[[str], str]

# What Ray calls its workers, in this order: the first that fits.
RAY_ROLES = (
    (":Model", "model"),
    (":Ingress", "ingress"),
    (":Tokenizer", "tokenizer"),
    ("ServeController", "controller"),
    ("ray::ProxyActor", "proxy"),
    ("HAProxyManager", "proxy manager"),
    ("Agent", "dashboard and agents"),
)
RAY_SERVERS = {"raylet", "gcs_server"}  # their command lines name the agents that they start


def ray_role(title: str) -> str:
    """What a process of a Ray Serve system does, by its command line.

    >>> ray_role("ray::ServeReplica:embeddings:Model-Ivysaur"), ray_role("/ray/core/src/ray/raylet/raylet --port 1")
    ('model', 'other')
    """
    if title.startswith("ray::"):
        return next((role for part, role in RAY_ROLES if part in title), "other")
    program = Path(title.split(" ")[0]).name
    if program == "haproxy":
        return "haproxy"
    if program not in RAY_SERVERS and ("dashboard" in title or "agent" in title):
        return "dashboard and agents"
    return "other"


def server_role(_: str) -> str:
    """A system whose processes are not told apart."""
    return "server"


def tree(root: int) -> list[psutil.Process]:
    """The process, its descendants, and whatever shares a session with one of them: orphans, such as HAProxy.

    The root leads a session of its own, or this would find more than the system.
    """
    parents = psutil.Process(root)
    family = [parents, *parents.children(recursive=True)]
    pids = {process.pid for process in family}
    sessions = {_session(pid) for pid in pids} - {0, _session(os.getpid())}
    others = [pid for pid in psutil.pids() if pid not in pids and _session(pid) in sessions]
    for pid in others:
        try:
            family.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    return family


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:  # it ended, or is somebody else's
        return 0


def cpu(processes: list[psutil.Process]) -> dict[int, float]:
    """CPU seconds that each process has used since its start, by process id."""
    spent: dict[int, float] = {}
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        spent[process.pid] = times.user + times.system
    return spent


def resident_mb(processes: list[psutil.Process]) -> float:
    """Resident memory in MB (1e6 bytes) less shared memory: cheap to read, but counts what forks share for each."""
    return _memory_mb(processes, lambda process: process.memory_info().rss - process.memory_info().shared)


def unique_mb(processes: list[psutil.Process]) -> float:
    """The unique set sizes in MB; for these the kernel walks every page, which takes some 0.1 s a Ray system."""
    return _memory_mb(processes, lambda process: process.memory_full_info().uss)


def _memory_mb(processes: list[psutil.Process], read: Callable[[psutil.Process], int]) -> float:
    total = 0
    for process in processes:
        with suppress(psutil.Error):  # it ended
            total += read(process)
    return total / 1e6


def wait_until_idle(root: int) -> bool:
    """Wait for the requests that a measurement abandoned in flight; whether the system is idle now."""
    processes = tree(root)
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    before = cpu(processes)
    while time.monotonic() < deadline:
        time.sleep(IDLE_WINDOW_S)
        after = cpu(processes)
        if sum(after.values()) - sum(before.values()) < IDLE_SHARE * IDLE_WINDOW_S:
            return True
        before = after
    return False


def _busy() -> float:
    """CPU seconds that the machine has spent on anything, since its start."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq


@dataclass
class Meter:
    """`with Meter(root, role) as meter:` measures a system while the block runs."""

    root: int
    role: Role
    cpu_s: dict[str, float] = field(default_factory=dict)  # by role
    seconds: float = 0.0
    peak_mb: float = 0.0  # the sum of unique set sizes
    machine_s: float = 0.0  # CPU seconds of the whole machine

    def __enter__(self) -> "Meter":
        self._processes = tree(self.root)
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()
        self._before, self._machine = cpu(self._processes), _busy()
        self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds, self.machine_s = time.monotonic() - self._started, _busy() - self._machine
        processes = tree(self.root) if psutil.pid_exists(self.root) else []
        after = cpu(processes)
        self._stop.set()
        self._sampler.join()
        # What is sampled while it counts is the cheap size, set right by what forks share, which does not change.
        self.peak_mb += unique_mb(processes) - resident_mb(processes)
        for process in processes:
            try:
                role = self.role(" ".join(process.cmdline()))
            except psutil.Error:
                continue
            spent = after.get(process.pid, 0.0) - self._before.get(process.pid, 0.0)
            self.cpu_s[role] = self.cpu_s.get(role, 0.0) + spent

    def _sample(self) -> None:
        while True:
            self.peak_mb = max(self.peak_mb, resident_mb(self._processes))
            if self._stop.wait(SAMPLE_PERIOD_S):
                return
