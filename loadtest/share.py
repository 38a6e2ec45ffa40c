"""`python -m loadtest.share`: what of the bare engine's speed comes through the whole service, by turns of seconds.

`loadtest.bench` measures the two minutes apart, and meanwhile a shared machine's speed moves by more than what is asked
here. While the engine has its turn, every process of the service is stopped, so that it has the machine for itself.
"""

import argparse
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil

from loadtest import raw, wrk
from loadtest.meter import tree
from loadtest.systems import systems
from loadtest.weights import tokens
from loadtest.workload import CELLS, Cell, write
from serve_app.engines import Engine

NAMES = ["32x64w-4c", "mixed-2c"]
SECONDS = 7.0
WARM_UP_S = 4.0
# After a turn of the engine, until the service's own clocks have caught up.
RESUME_S = 1.5


@contextmanager
def stopped(root: int) -> Iterator[None]:
    """All processes of a system do nothing meanwhile."""
    family = tree(root)
    try:
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        yield
    finally:
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        time.sleep(RESUME_S)


def turns(engine: Engine, root: int, url: str, cell: Cell, pairs: int, folder: Path) -> list[tuple[float, float]]:
    """Tokens/s of the service and of the engine, a pair a turn of both; either is the first in every other one."""
    bodies = write(cell, folder)
    tokens_a_request = tokens(cell)

    def serve(seconds: float) -> float:
        load = wrk.run(url, bodies, cell.connections, seconds)
        assert load.refused + load.broken == 0, f"{load.refused} refused, {load.broken} broken"
        return wrk.rate(load, cell) * tokens_a_request

    def compute(seconds: float) -> float:
        with stopped(root):
            return raw.measure(engine, cell, seconds)["tokens_per_s"]

    serve(WARM_UP_S)
    compute(WARM_UP_S)
    found = []
    for pair in range(pairs):
        if pair % 2:
            computed = compute(SECONDS)
            found.append((serve(SECONDS), computed))
        else:
            found.append((serve(SECONDS), compute(SECONDS)))
    return found


def share(found: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The geometric mean of the pairs' ratios, and its standard error as a part of it.

    >>> mean, error = share([(9.0, 10.0), (8.1, 10.0)])
    >>> round(mean, 3), round(error, 3)
    (0.854, 0.053)
    """
    logs = np.log([served / computed for served, computed in found])
    return float(np.exp(logs.mean())), float(logs.std(ddof=1) / len(logs) ** 0.5)


def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.share")
    parser.add_argument("--cells", nargs="+", default=NAMES, choices=[cell.name for cell in CELLS], metavar="CELL")
    parser.add_argument("--pairs", type=int, default=8, help="turns of both for each cell")
    options = parser.parse_args()
    if options.pairs < 2:
        parser.error(f"--pairs is {options.pairs}, and has to be 2 or more for a standard error")
    wrk.require()
    # A service whose processes are stopped would outlive this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    print(f"`{shlex.join(['python', '-m', 'loadtest.share', *sys.argv[1:]])}`")
    print("\n| cell | service, tokens/s | engine, tokens/s | share | its standard error |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="share-") as scratch:
        folder = Path(scratch)
        system = systems(folder)["ours"]
        with system.running(folder) as root:
            engine = raw.engine()
            for cell in (each for each in CELLS if each.name in options.cells):
                found = turns(engine, root, system.url, cell, options.pairs, folder)
                served, computed = np.median(found, axis=0)
                mean, error = share(found)
                print(f"| {cell.name} | {served:,.0f} | {computed:,.0f} | {mean:.3f} | {error:.3f} |", flush=True)


if __name__ == "__main__":
    main()
