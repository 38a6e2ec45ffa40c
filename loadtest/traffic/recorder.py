"""From requests as they are answered to the record of a run, and the line that says how it goes."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from loadtest.traffic.run import Columns, Replicas, Writer


class Collector:
    """The requests of one process, until they are taken; they arrived at seconds since the epoch, which all share."""

    def __init__(self) -> None:
        self._by_kind: dict[str, Columns] = {}

    def on_request(
        self,
        name: str,
        response_time: float,
        start_time: float,
        context: Mapping[str, int],
        exception: Exception | None,
        **_: Any,
    ) -> None:
        """Listens to Locust's `request`."""
        fault = str(exception) if exception else None
        self._by_kind.setdefault(name, Columns()).add(start_time, context, response_time, fault)

    def take(self) -> dict[str, dict[str, Any]]:
        """What came since it was last taken, in plain containers, so that it can be sent to the master."""
        taken, self._by_kind = self._by_kind, {}
        return {kind: asdict(columns) for kind, columns in taken.items()}


class Recorder:
    """Writes what all processes collect, with times counted from `started` (seconds since the epoch)."""

    def __init__(self, writer: Writer, started: float) -> None:
        self._writer = writer
        self._started = started
        self._recent = Columns()
        self._line_s = 0.0
        self._failed = 0
        self._replicas: dict[str, Replicas] = {}

    def add(self, taken: Mapping[str, Mapping[str, Any]]) -> None:
        """What one process collected."""
        for kind, columns in taken.items():
            since_start = Columns(**columns)
            # Another machine's clock may be a little behind.
            since_start.at_s = [max(0.0, at - self._started) for at in since_start.at_s]
            self._writer.requests(kind, since_start)
            self._recent.latency_ms += since_start.latency_ms
            self._failed += len(since_start.faults)

    def note(self, text: str) -> None:
        """A sentence for whoever reads the report; said at once, too."""
        print(f"load: {text}", flush=True)
        self._writer.note(text)

    def sample(self, now: float, users: int, deployments: dict[str, Replicas] | None) -> None:
        """One second."""
        self._replicas = deployments or {}
        self._writer.sample(now - self._started, users, deployments)

    def line(self, now: float, users: int) -> str:
        """How it goes: rate and p99 since the last line, failures since the start, replicas now."""
        at_s = now - self._started
        latencies, self._recent = self._recent.latency_ms, Columns()
        rate = len(latencies) / max(at_s - self._line_s, 1e-9)
        self._line_s = at_s
        self._writer.flush()
        p99 = f"p99 {np.percentile(latencies, 99):7,.0f} ms" if latencies else "p99       - ms"
        scaled = "  ".join(
            f"{name} {running}" if running == wanted else f"{name} {running}->{wanted}"
            for name, (running, wanted) in self._replicas.items()
        )
        told = scaled or "replicas unknown"
        return f"{at_s:5.0f} s  {users:5,} users  {rate:7,.1f} req/s  {p99}  {self._failed:,} failed  {told}"
