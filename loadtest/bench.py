"""`make bench`: measures the service beside its peers, in turns, and writes a report.

One system runs at a time, and each round starts with another one, so that what drifts on the machine meets all alike.
Each measurement is written as it comes: a run that breaks off loses none, and `python -m loadtest.report` renders it.
"""

import argparse
import json
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from loadtest import report, wrk
from loadtest.meter import Meter, wait_until_idle
from loadtest.systems import ROOT, StartError, System, gpu_systems, systems
from loadtest.weights import agreement, reference, tokens
from loadtest.workload import CELLS, Cell, requests, write

RAW = "raw-engine"
SYSTEMS = ("ours", "infinity-onnx", "infinity-torch", "plain-serve", RAW)
GPU_SYSTEMS = ("ours", "infinity-torch")  # the engine alone on a GPU: `python -m loadtest.gpu`
RESULTS = ROOT / "loadtest" / "results"
WARM_UP_S = 2.0
WARM_UP_CONNECTIONS = 8
BURST_S = 1.0
# Of whose vectors the agreement with the definition is looked at: a short, a usual, and a text that is cut.
CHECKED = ("9w", "64w", "510w")

count_tokens = cache(tokens)


class Recorder:
    """Appends to the raw results, and says each thing on stdout."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file

    def record(self, line: str, **fields: Any) -> None:
        with self._file.open("a") as out:
            out.write(json.dumps(fields) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


@cache
def checked() -> tuple[list[str], Any]:
    """Texts whose vectors every system is asked for, and the vectors by definition."""
    texts = [requests(next(cell for cell in CELLS if cell.shape == shape))[0][0] for shape in CHECKED]
    return texts, reference(texts)


def chosen(prefixes: Sequence[str]) -> list[Cell]:
    """The cells whose names begin with one of the prefixes; all of them where there are none."""
    return [cell for cell in CELLS if not prefixes or cell.name.startswith(tuple(prefixes))]


def warm_up(system: System, root: int, cells: Sequence[Cell], folder: Path) -> None:
    """Two seconds of short texts, then a burst of each other shape."""
    wrk.run(system.url, write(CELLS[0], folder), WARM_UP_CONNECTIONS, WARM_UP_S)
    wait_until_idle(root)
    for shape in dict.fromkeys((cell.shape, cell.encoding) for cell in cells):
        alike = [cell for cell in cells if (cell.shape, cell.encoding) == shape]
        connections = min(WARM_UP_CONNECTIONS, max(cell.connections for cell in alike))
        wrk.run(system.url, write(alike[0], folder), connections, BURST_S)
        wait_until_idle(root)


def measure(system: System, root: int, cell: Cell, seconds: float, folder: Path) -> dict[str, Any]:
    """One measurement; the system is idle before and after it."""
    bodies = write(cell, folder)
    with Meter(root, system.role) as meter:
        load = wrk.run(system.url, bodies, cell.connections, seconds)
    was_idle = wait_until_idle(root)
    rate = wrk.rate(load, cell)
    return {
        "requests_per_s": rate,
        "texts_per_s": rate * cell.rows,
        "tokens_per_s": rate * count_tokens(cell),
        "p50_ms": load.p50_ms,
        "p99_ms": load.p99_ms,
        "answers": load.answers,
        "errors": load.refused + load.broken,
        # By rates, not by counts: requests that were under way at the end were worked on too.
        "cpu_ms": {role: spent / meter.seconds / rate * 1e3 for role, spent in meter.cpu_s.items()} if rate else {},
        "memory_mb": meter.peak_mb,
        "wrk_cpu": load.cpu,
        # Cores that were busy with neither the system nor wrk: the machine was not this benchmark's alone.
        "foreign_cpu": (meter.machine_s - sum(meter.cpu_s.values())) / meter.seconds - load.cpu,
        "idle_after": was_idle,
    }


def run_server(system: System, cells: Sequence[Cell], factor: float, round_: int, folder: Path, out: Recorder) -> None:
    """One turn of a server: start, warm up, measure, stop."""
    started = time.monotonic()
    with system.running(folder) as root:
        took = time.monotonic() - started
        texts, want = checked()
        cosine = min(agreement(system.embed([text]), want[[row]]) for row, text in enumerate(texts))
        out.record(
            f"round {round_ + 1} {system.name}: ready after {took:.1f} s, lowest cosine to the definition {cosine:.6f}",
            kind="start",
            round=round_,
            system=system.name,
            seconds=took,
            cosine=cosine,
            versions=system.versions(),
        )
        warm_up(system, root, cells, folder)
        for cell in cells:
            found = measure(system, root, cell, cell.seconds * factor, folder)
            out.record(
                f"round {round_ + 1} {system.name} {cell.name}: {found['requests_per_s']:.2f} requests/s, p50 "
                f"{found['p50_ms']:.1f} ms, p99 {found['p99_ms']:.1f} ms, {found['errors']} errors",
                kind="measure",
                round=round_,
                system=system.name,
                cell=cell.name,
                **found,
            )


def run_raw(cells: Sequence[Cell], factor: float, round_: int, out: Recorder) -> None:
    """One turn of the engine without a server; how vectors would be written is nothing to it."""
    names = [cell.name for cell in cells if cell.encoding == "base64"]
    command = [sys.executable, "-m", "loadtest.raw", str(factor), *names]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in _lines(process):
            found = json.loads(line)
            out.record(
                f"round {round_ + 1} {RAW} {found['cell']}: {found['tokens_per_s']:.0f} tokens/s, "
                f"p50 of a batch {found['p50_ms']:.1f} ms",
                kind="measure",
                round=round_,
                system=RAW,
                errors=0,
                **found,
            )
    if process.returncode:
        raise StartError(f"{RAW} ended with status {process.returncode}")


def _lines(process: "subprocess.Popen[str]") -> Iterator[str]:
    assert process.stdout is not None
    try:
        yield from process.stdout
    finally:
        process.terminate()


def header(cells: Sequence[Cell], rounds: int, wrk_version: str, on_gpu: bool) -> dict[str, Any]:
    """What a report has to say of the run and its machine."""
    model = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown")
    packages = ["ray", "torch", "tokenizers", *([] if on_gpu else ["openvino", "transformers"])]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": shlex.join(["python", "-m", "loadtest.bench", *sys.argv[1:]]),
        "machine": {
            "cpu": model,
            "cores": psutil.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "kernel": platform.release(),
            **({"gpu": _gpu()} if on_gpu else {}),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
            "wrk": wrk_version,
        },
        "rounds": rounds,
        "cells": [asdict(cell) | {"tokens": count_tokens(cell)} for cell in cells],
    }


def _gpu() -> str:
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench", description="Measure the service and its peers.")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each system (default: 3)")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, metavar="NAME", help=f"default: all of {SYSTEMS}")
    parser.add_argument("--gpu", action="store_true", help=f"on this machine's GPU, and of the systems {GPU_SYSTEMS}")
    parser.add_argument("--cells", nargs="+", default=(), metavar="PREFIX", help="beginnings of cell names, such as 9w")
    parser.add_argument("--seconds-factor", type=float, default=1.0, help="scales the time of each measurement")
    parser.add_argument("--output", type=Path, help="the raw results; default: loadtest/results/DATE.jsonl")
    parsed = parser.parse_args()
    if not chosen(parsed.cells):
        parser.error(f"no cell begins with {parsed.cells}; there are {', '.join(cell.name for cell in CELLS)}")
    there = GPU_SYSTEMS if parsed.gpu else SYSTEMS
    parsed.systems = parsed.systems or there
    if not set(parsed.systems) <= set(there):
        parser.error(f"on a GPU only {', '.join(there)} can be measured")
    return parsed


def main() -> None:
    """Run the rounds, then render."""
    # As an exception, so that systems are stopped; and handled here, so that it is at its default in the systems even
    # where a shell ignores it for a background job.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    options = arguments()
    wrk_version = wrk.require()
    cells = chosen(options.cells)
    output = options.output or RESULTS / time.strftime("%Y-%m-%d-%H%M.jsonl")
    out = Recorder(output)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = Path(scratch)
        known = gpu_systems(folder) if options.gpu else systems(folder)
        servers = {name: system for name, system in known.items() if name in options.systems}
        for system in servers.values():
            system.prepare()
        out.record(f"writing {output}", kind="run", **header(cells, options.rounds, wrk_version, options.gpu))
        for round_ in range(options.rounds):
            names = list(options.systems)
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                try:
                    if name == RAW:
                        run_raw(cells, options.seconds_factor, round_, out)
                    else:
                        run_server(servers[name], cells, options.seconds_factor, round_, folder, out)
                except (StartError, OSError, RuntimeError, psutil.Error) as error:
                    # The others' turns are worth having all the same; the report names it.
                    out.record(
                        f"FAILED {name}: {error}", kind="failure", round=round_, system=name, reason=str(error)[-2000:]
                    )
    report.main([str(output)])


if __name__ == "__main__":
    main()
