"""Records of runs, written as a load test writes them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loadtest.traffic.run import Columns, Replicas, Run, Writer, read

# kind, arrival s, latency ms, fault
Asked = tuple[str, float, float, str | None]

ABOUT = {
    "version": 1,
    "started": "2026-01-02 03:04:05",
    "url": "http://127.0.0.1:8000",
    "shape": "soak",
    "duration_s": 10,
    "users": 4,
    "kinds": ["autocomplete", "rag"],
    "pacing": "closed",
    "workers": 1,
    "locust": "2",
    "limits": {"p99_ms": {"autocomplete": 300.0, "rag": 1000.0}, "error_rate": 0.001, "requests_per_s": 0.1},
}


def write(
    file: Path,
    asked: Iterable[Asked],
    samples: Iterable[tuple[float, int, Mapping[str, Replicas] | None]] = (),
    notes: Iterable[str] = (),
    **about: Any,
) -> Path:
    """A record of these requests, each of 2 inputs, 20 characters and 10 tokens, of these seconds, and with notes."""
    writer = Writer(file, ABOUT | about)
    for kind, at_s, latency_ms, fault in asked:
        columns = Columns()
        columns.add(at_s, {"inputs": 2, "characters": 20, "tokens": 10}, latency_ms, fault)
        writer.requests(kind, columns)
    for at_s, users, deployments in samples:
        writer.sample(at_s, users, deployments)
    for text in notes:
        writer.note(text)
    writer.close()
    return file


def run(folder: Path, asked: Iterable[Asked], samples: Iterable[Any] = (), **about: Any) -> Run:
    """The same, read again."""
    return read(write(folder / "run.jsonl.gz", asked, samples, **about))


def scaled(*counts: tuple[int, int]) -> list[tuple[float, int, dict[str, Replicas]]]:
    """Samples of seconds 1, 2, ... with so many running and wanted replicas of one deployment."""
    return [(float(second), 4, {"Model": Replicas(*each)}) for second, each in enumerate(counts, start=1)]
