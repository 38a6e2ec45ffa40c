"""The record of a run: gzipped JSON lines, from which it can be drawn, judged or replayed again.

Each line is an object that says in `line` what it holds:

- `run`, once: what was asked for (url, shape, users, ...), and when it started.
- `requests`: requests of one kind in columns of equal length. `at_s` is when each arrived, in seconds since the start;
  `inputs`, `characters` and `tokens` are its size (0 tokens where no answer told them), `latency_ms` its time to the
  answer; `faults` holds what was wrong by row number. Lines come in the order of the answers, not of the arrivals.
- `sample`, each second: `at_s`, `users`, and `deployments`: [running, wanted] replicas of each by Serve's own account;
  null where Serve didn't tell.
- `note`: a sentence in `text` that whoever reads the run's numbers should know.
- `end`, once, last.
"""

import gzip
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
# Milliseconds of arrival and hundredths of one of latency are enough, and short to write.
AT_DIGITS, LATENCY_DIGITS = 3, 2


class Replicas(NamedTuple):
    """Of one deployment: how many run, and how many Serve wants."""

    running: int
    wanted: int


class Sample(NamedTuple):
    """What one second looked like; no deployments where Serve told nothing."""

    at_s: float
    users: int
    deployments: dict[str, Replicas]


@dataclass
class Columns:
    """Requests of one kind, as they come in."""

    at_s: list[float] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)

    def add(self, at_s: float, size: Mapping[str, int], latency_ms: float, fault: str | None) -> None:
        """One request; `size` holds its inputs, characters and tokens."""
        if fault is not None:
            self.faults[len(self.at_s)] = fault
        self.at_s.append(at_s)
        self.inputs.append(size["inputs"])
        self.characters.append(size["characters"])
        self.tokens.append(size["tokens"])
        self.latency_ms.append(latency_ms)


class Writer:
    """Appends to the record of a run; whoever reads it meanwhile, or after a crash, finds whole lines."""

    def __init__(self, file: Path, about: Mapping[str, Any]) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file
        self._out = gzip.open(file, "wt", encoding="utf-8")  # noqa: SIM115 - open as long as the run goes on
        self._write("run", about)

    def requests(self, kind: str, columns: Columns) -> None:
        """Requests of one kind."""
        rounded = vars(columns) | {
            "at_s": [round(at_s, AT_DIGITS) for at_s in columns.at_s],
            "latency_ms": [round(latency_ms, LATENCY_DIGITS) for latency_ms in columns.latency_ms],
        }
        self._write("requests", {"kind": kind} | rounded)

    def sample(self, at_s: float, users: int, deployments: Mapping[str, Replicas] | None) -> None:
        """One second."""
        self._write("sample", {"at_s": round(at_s, AT_DIGITS), "users": users, "deployments": deployments})

    def note(self, text: str) -> None:
        """A sentence."""
        self._write("note", {"text": text})

    def close(self) -> None:
        """The last line."""
        self._write("end", {})
        self._out.close()

    def flush(self) -> None:
        """Have all that was written reach the file."""
        self._out.flush()

    def _write(self, line: str, content: Mapping[str, Any]) -> None:
        self._out.write(json.dumps({"line": line} | dict(content), separators=(",", ":")) + "\n")


@dataclass(frozen=True)
class Requests:
    """Requests by arrival, in columns [N]; `fault` is empty where the answer was right."""

    kind: npt.NDArray[np.object_]
    at_s: Floats
    inputs: Ints
    characters: Ints
    tokens: Ints
    latency_ms: Floats
    fault: npt.NDArray[np.object_]

    def __len__(self) -> int:
        return len(self.at_s)

    @property
    def done_s(self) -> Floats:
        """When each was answered."""
        return self.at_s + self.latency_ms / 1e3

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """Which were answered rightly."""
        return np.asarray(self.fault == "", bool)

    def where(self, mask: npt.NDArray[np.bool_]) -> "Requests":
        """Those that the mask names."""
        return Requests(**{name: column[mask] for name, column in vars(self).items()})


@dataclass(frozen=True)
class Run:
    """A run as it was recorded; not `whole` where it was cut off, or still goes on."""

    about: dict[str, Any]
    requests: Requests
    samples: list[Sample]
    notes: list[str]
    whole: bool

    @property
    def elapsed_s(self) -> float:
        """From the start to the last thing seen."""
        last_sample = self.samples[-1].at_s if self.samples else 0.0
        return max(last_sample, float(self.requests.done_s.max(initial=0.0)))


def read(file: Path) -> Run:
    """The run of a record; raises ValueError with one sentence where it is none."""
    about: dict[str, Any] = {}
    samples: list[Sample] = []
    notes: list[str] = []
    parts: list[Requests] = []
    whole = False
    try:
        for content in _lines(file):
            line = content["line"]
            if line == "run":
                about = content
            elif line == "requests":
                parts.append(_requests(content))
            elif line == "sample":
                told = content["deployments"] or {}
                deployments = {name: Replicas(*replicas) for name, replicas in told.items()}
                samples.append(Sample(content["at_s"], content["users"], deployments))
            elif line == "note":
                notes.append(content["text"])
            elif line == "end":
                whole = True
    except (gzip.BadGzipFile, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not the record of a run ({type(error).__name__}).") from None
    if not about:
        raise ValueError(f"{file} is not the record of a run: its first line is missing.")
    return Run(about, _by_arrival(parts), samples, notes, whole)


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole: of a run that still goes on, or was killed, the last one may not be."""
    with gzip.open(file, "rt", encoding="utf-8") as source, suppress(EOFError):
        for line in source:
            yield json.loads(line)


def _requests(content: Mapping[str, Any]) -> Requests:
    count = len(content["at_s"])
    fault = np.full(count, "", object)
    for row, reason in content["faults"].items():
        fault[int(row)] = reason
    return Requests(
        kind=np.full(count, content["kind"], object),
        at_s=np.array(content["at_s"], float),
        inputs=np.array(content["inputs"], int),
        characters=np.array(content["characters"], int),
        tokens=np.array(content["tokens"], int),
        latency_ms=np.array(content["latency_ms"], float),
        fault=fault,
    )


def _by_arrival(parts: list[Requests]) -> Requests:
    nobody = {"kind": "", "at_s": [], "inputs": [], "characters": [], "tokens": [], "latency_ms": [], "faults": {}}
    parts = parts or [_requests(nobody)]
    order = np.argsort(np.concatenate([part.at_s for part in parts]), kind="stable")
    columns = {field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Requests)}
    return Requests(**{name: column[order] for name, column in columns.items()})
