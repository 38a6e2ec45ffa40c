"""`python -m loadtest.endurance`: whether cost and memory stay what they were over 100,000 requests.

The texts have 4 to 64 words, so that an engine which prepares itself for each shape meets all it will. Ten and a
hundred requests go one by one; the rest over 32 connections, in slices, each with its cost and the memory at its end.
"""

import argparse
import shlex
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from loadtest import wrk
from loadtest.meter import Meter, ray_role, tree
from loadtest.systems import systems
from loadtest.workload import Cell, requests, write

CELL = Cell("4to64w-32c", (4, 64), 1, 32, "base64", 10)
ONE_BY_ONE = (10, 100)
SHOWN = ("model", "ingress", "tokenizer", "haproxy", "controller")


@dataclass(frozen=True)
class Slice:
    """A run of requests: how many were answered by its end, CPU milliseconds of each, and MB by role at the end."""

    answers: int
    cpu_ms: float
    memory_mb: dict[str, float]


def memory_by_role(root: int) -> dict[str, float]:
    """Unique set sizes in MB (1e6 bytes)."""
    held: dict[str, float] = defaultdict(float)
    for process in tree(root):
        with suppress(psutil.Error):  # it ended
            held[ray_role(" ".join(process.cmdline()))] += process.memory_full_info().uss / 1e6
    return held


def slope_mb(slices: Sequence[Slice], role: str) -> float:
    """MB that 100,000 more requests add, by least squares over the later half.

    >>> slope_mb([Slice(n * 1000, 1.0, {"model": 300 + n}) for n in range(10)], "model")
    100.0
    """
    later = slices[len(slices) // 2 :]
    fitted = np.polyfit([each.answers for each in later], [each.memory_mb.get(role, 0.0) for each in later], 1)
    return round(float(fitted[0]) * 1e5, 6)


def line(each: Slice) -> str:
    held = " | ".join(f"{each.memory_mb.get(role, 0):.0f}" for role in SHOWN)
    return f"| {each.answers:,} | {each.cpu_ms:.2f} | {held} |"


def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.endurance")
    parser.add_argument("--requests", type=int, default=100_000)
    total = parser.parse_args().requests
    wrk.require()
    with tempfile.TemporaryDirectory(prefix="endurance-") as scratch:
        folder = Path(scratch)
        system = systems(folder)["ours"]
        bodies = write(CELL, folder)
        texts = [request[0] for request in requests(CELL)]
        print(f"`{shlex.join(['python', '-m', 'loadtest.endurance', *sys.argv[1:]])}`")
        print(f"\n| requests | CPU ms a request | {' | '.join(f'{role} MB' for role in SHOWN)} |")
        print("|---" * (2 + len(SHOWN)) + "|", flush=True)
        slices: list[Slice] = []
        answers = 0
        with system.running(folder) as root:
            for count in ONE_BY_ONE:
                with Meter(root, system.role) as meter:
                    for text in texts[:count]:
                        system.embed([text])
                answers += count
                slices.append(Slice(answers, sum(meter.cpu_s.values()) / count * 1e3, memory_by_role(root)))
                print(line(slices[-1]), flush=True)
            while answers < total:
                with Meter(root, system.role) as meter:
                    load = wrk.run(system.url, bodies, CELL.connections, CELL.seconds)
                assert load.refused + load.broken == 0, f"{load.refused} refused, {load.broken} broken"
                answers += load.answers
                cost_ms = sum(meter.cpu_s.values()) / load.answers * 1e3
                slices.append(Slice(answers, cost_ms, memory_by_role(root)))
                print(line(slices[-1]), flush=True)
        loaded = slices[len(ONE_BY_ONE) :]
        tenth = max(1, len(loaded) // 10)
        first, last = (np.mean([each.cpu_ms for each in part]) for part in (loaded[:tenth], loaded[-tenth:]))
        print(f"\nCost of the last tenth over the first, at 32 connections: {last / first:.2f}.")
        slopes = ", ".join(f"{role} {slope_mb(loaded, role):+.1f}" for role in SHOWN)
        print(f"MB that 100,000 more requests add, over the later half: {slopes}.")


if __name__ == "__main__":
    main()
