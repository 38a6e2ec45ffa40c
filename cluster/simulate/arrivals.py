"""What comes when: requests as times and tokens, made from a rate over time or read from a recorded run."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# A rate of requests over time: from seconds since the start [N] to requests/s [N].
Shape = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Arrivals:
    """Requests in the order in which they come: `at_s` float64 [N], `tokens` int64 [N]."""

    at_s: NDArray[np.float64]
    tokens: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.at_s)


def shapes(base: float, peak: float, seconds: float) -> dict[str, Shape]:
    """Every shape of load by name, between two rates in requests/s, for a run of so many seconds."""
    middle = (base + peak) / 2
    return {
        "steady": lambda t: np.full_like(t, base),
        # the peak from a sixth of the time on, until a half
        "step": lambda t: np.where((t >= seconds / 6) & (t < seconds / 2), peak, base),
        "steps": lambda t: base + (peak - base) * np.minimum(4, np.floor(5 * t / seconds)) / 4,
        "ramp": lambda t: base + (peak - base) * t / seconds,
        # a twentieth of the time at the peak, three times
        "spike": lambda t: np.where((t / seconds * 4 % 1 < 0.2) & (t > seconds / 5), peak, base),
        "sawtooth": lambda t: base + (peak - base) * (t / seconds * 5 % 1),
        "diurnal": lambda t: middle - (peak - base) / 2 * np.cos(2 * np.pi * t / seconds),
        # one visitor an hour, as a service that may sleep sees them
        "rare": lambda t: np.where(t % (seconds / 3) < seconds / 30, base, 0.0),
    }


def arrivals(shape: Shape, seconds: float, tokens: float, spread: float = 0.0, seed: int = 0) -> Arrivals:
    """Requests that come independently of each other at the shape's rate.

    Sizes are log-normal around a median of `tokens`, where `spread` is the deviation of their logarithm: 0 for queries
    of one size, 1.5 for a heavy tail, in which one in a hundred is 33 times as long.
    """
    random = np.random.default_rng(seed)
    grid = np.arange(0.0, seconds, min(0.1, seconds / 1000))
    rates = np.maximum(0.0, shape(grid))
    step_s = grid[1] - grid[0]
    counts = random.poisson(rates * step_s)
    at_s = np.repeat(grid, counts) + random.uniform(0, step_s, counts.sum())
    sizes = np.maximum(3, np.round(tokens * np.exp(spread * random.standard_normal(len(at_s)))))
    return Arrivals(np.sort(at_s), sizes.astype(np.int64))


def recorded(file: Path) -> Arrivals:
    """A recorded run: JSON lines with `arrival_s` and `tokens`, in any order; the first request comes at 0."""
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    if not rows:
        raise ValueError(f"{file} holds no requests")
    at_s = np.array([row["arrival_s"] for row in rows], np.float64)
    order = np.argsort(at_s, kind="stable")
    tokens = np.array([row["tokens"] for row in rows], np.int64)
    return Arrivals(at_s[order] - at_s.min(), tokens[order])
