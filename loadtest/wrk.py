"""The load: one run of wrk, whose one thread keeps a number of connections busy."""

import json
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.workload import Cell

SCRIPT = Path(__file__).with_name("wrk.lua")
# wrk gives a request up after this long; longer than any cell, so that only what hangs counts as broken.
TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk saw. Its percentiles are corrected for coordinated omission, so that one stall counts for each request
    that it kept from being sent. `cpu` is wrk's own share of a core: near 1, wrk itself was the limit."""

    answers: int
    seconds: float
    mean_ms: float
    p50_ms: float
    p99_ms: float
    refused: int  # answers with a status of 400 and more
    broken: int  # connections that failed, and timeouts
    cpu: float


def require() -> str:
    """The version of wrk; raises SystemExit where it is missing."""
    if shutil.which("wrk") is None:
        raise SystemExit("bench: wrk is missing: install the Debian package `wrk` (apt-get install wrk).")
    # It exits with 1 after having said its version.
    said = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False)
    return (said.stdout + said.stderr).splitlines()[0].split(" Copyright")[0].removeprefix("wrk ")


def run(url: str, bodies: Path, connections: int, seconds: float) -> Load:
    """Post the bodies in turn over so many connections; whole seconds, at least one."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", f"{TIMEOUT_S}s"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run(
        [*command, "-s", str(SCRIPT), f"{url}/embeddings", "--", str(bodies)], capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = next((line for line in ran.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise RuntimeError(f"wrk failed: {ran.stderr.strip() or ran.stdout.strip()}")
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Load(**found, cpu=spent / found["seconds"])


def rate(load: Load, cell: Cell) -> float:
    """Requests a second that were answered well.

    Of single texts there are enough to count. Of lists only a few end within the time, and a count leaves out what was
    under way at its end, which flatters the faster system. Connections by mean latency leaves out nothing, but where
    the first answers came sooner than the rest would have it is far too high; so it counts as long as it adds no more
    than half a request a connection, which is what was done on average of those under way.
    """
    good = load.answers - load.refused
    if not good:
        return 0.0
    counted = load.answers / load.seconds
    if cell.rows > 1:
        by_latency = cell.connections / (load.mean_ms / 1e3)
        counted = max(counted, min(by_latency, (load.answers + cell.connections / 2) / load.seconds))
    return counted * good / load.answers
