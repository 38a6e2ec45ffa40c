"""`python -m loadtest.raw SECONDS_FACTOR CELL...`: the service's engine alone, without a server: one JSON line a cell.

The texts are tokenized before. All lanes are kept busy, as far as there are connections to keep them so. A batch is one
lane's share of what the cell's connections would have in flight, at most what the service gives its engine at a time;
or one list as a whole.
"""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice

import numpy as np

from loadtest.weights import network, packed
from loadtest.workload import CELLS, Cell
from serve_app.engines import Engine, open_engine
from serve_app.packing import Packed, concat, cuts
from serve_app.settings import ModelSettings

BATCH_TOKENS = ModelSettings().batch_tokens


def engine() -> Engine:
    """The service's engine, with as many threads as the Model replica of serve_config.yaml gets."""
    return open_engine(network(), "auto", "auto", min(2, os.cpu_count() or 1))


def batches(cell: Cell, requests: list[Packed], lanes: int) -> list[Packed]:
    """What the engine is given at a time."""
    if cell.rows > 1:
        return requests
    together: list[Packed] = []
    step = cell.connections // lanes
    for start in range(0, len(requests) - step + 1, step):
        waiting = requests[start : start + step]
        edges = cuts([request.tokens for request in waiting], BATCH_TOKENS)
        # Behind a full batch more would be waiting already, so what is left over here is no batch of its own.
        together.append(concat(waiting[: edges[1]]))
    return together


def measure(engine: Engine, cell: Cell, seconds: float) -> dict[str, float]:
    """Rates, and milliseconds of one batch, over so many seconds."""
    lanes = engine.lanes if cell.rows > 1 else min(engine.lanes, cell.connections)
    work = batches(cell, packed(cell), lanes)
    for batch in work[: 2 * lanes]:  # an engine prepares itself for each new shape
        engine.embed(batch)
    started = time.perf_counter()
    stop = started + seconds

    def run(lane: int) -> list[tuple[Packed, float]]:
        """Each batch that this lane was through with, and when."""
        done = []
        for batch in islice(cycle(work), lane * len(work) // lanes, None):
            engine.embed(batch)
            done.append((batch, time.perf_counter()))
            if done[-1][1] >= stop:
                return done
        raise AssertionError("a cycle ended. This is a bug.")

    with ThreadPoolExecutor(lanes) as pool:
        done = list(pool.map(run, range(lanes)))
    # A lane's rate is over its own time, since each stops behind a batch of its own.
    rates = np.zeros(2)
    took: list[float] = []
    for batches_of_lane in done:
        ends = [end for _, end in batches_of_lane]
        took += np.diff([started, *ends]).tolist()
        counts = np.sum([(batch.rows, batch.tokens) for batch, _ in batches_of_lane], axis=0)
        rates += counts / (ends[-1] - started)
    p50, p99 = np.percentile(took, [50, 99]) * 1e3
    return {
        "requests_per_s": float(rates[0]) / cell.rows,
        "texts_per_s": float(rates[0]),
        "tokens_per_s": float(rates[1]),
        "p50_ms": float(p50),
        "p99_ms": float(p99),
    }


def main() -> None:
    """Measure the named cells."""
    factor, names = float(sys.argv[1]), sys.argv[2:]
    opened = engine()
    for cell in CELLS:
        if cell.name in names:
            print(json.dumps({"cell": cell.name, **measure(opened, cell, cell.seconds * factor)}), flush=True)


if __name__ == "__main__":
    main()
