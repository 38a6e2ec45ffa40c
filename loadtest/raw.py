"""`python -m loadtest.raw SECONDS_FACTOR CELL...`: the service's engine alone, without a server: one JSON line a cell.

The texts are tokenized before. A batch is what the cell's connections would have in flight, at most what the service
gives its engine at a time, or one list as a whole.
"""

import json
import os
import sys
import time
from itertools import cycle

import numpy as np

from loadtest.weights import network, packed
from loadtest.workload import CELLS, Cell
from serve_app.engines import Engine, open_engine
from serve_app.packing import Packed, concat, cuts
from serve_app.settings import ModelSettings

BATCH_TOKENS = ModelSettings().batch_tokens


def batches(cell: Cell, requests: list[Packed]) -> list[Packed]:
    """What the engine is given at a time."""
    if cell.rows > 1:
        return requests
    together: list[Packed] = []
    for start in range(0, len(requests) - cell.connections + 1, cell.connections):
        waiting = requests[start : start + cell.connections]
        edges = cuts([request.tokens for request in waiting], BATCH_TOKENS)
        # Behind a full batch more would be waiting already, so what is left over here is no batch of its own.
        stop = edges[1]
        together.append(concat(waiting[:stop]))
    return together


def measure(engine: Engine, cell: Cell, seconds: float) -> dict[str, float]:
    """Rates, and milliseconds of one batch, over so many seconds."""
    work = batches(cell, packed(cell))
    for batch in work[:2]:  # an engine prepares itself for each new shape
        engine.embed(batch)
    rows = tokens = 0
    took: list[float] = []
    started = time.perf_counter()
    for batch in cycle(work):
        before = time.perf_counter()
        engine.embed(batch)
        now = time.perf_counter()
        took.append((now - before) * 1e3)
        rows += batch.rows
        tokens += batch.tokens
        if now - started >= seconds:
            break
    spent = now - started
    p50, p99 = np.percentile(took, [50, 99])
    return {
        "requests_per_s": rows / cell.rows / spent,
        "texts_per_s": rows / spent,
        "tokens_per_s": tokens / spent,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
    }


def main() -> None:
    """Measure the named cells."""
    factor, names = float(sys.argv[1]), sys.argv[2:]
    # As many threads as the Model replica of serve_config.yaml gets.
    engine = open_engine(network(), "auto", "auto", min(2, os.cpu_count() or 1))
    for cell in CELLS:
        if cell.name in names:
            print(json.dumps({"cell": cell.name, **measure(engine, cell, cell.seconds * factor)}), flush=True)


if __name__ == "__main__":
    main()
