"""The decisions of a report, as pure functions of plain numbers."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stat:
    """A number over the rounds."""

    median: float
    low: float
    high: float


def stat(values: Sequence[float]) -> Stat:
    """Median and spread of at least one value.

    >>> stat([3.0, 1.0, 2.0])
    Stat(median=2.0, low=1.0, high=3.0)
    """
    return Stat(statistics.median(values), min(values), max(values))


def geometric_mean(ratios: Sequence[float]) -> float | None:
    """The mean for ratios: twice as fast and half as fast cancel. None where there are none.

    >>> geometric_mean([2.0, 0.5]), geometric_mean([])
    (1.0, None)
    """
    return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None


def ratio_to_best(ours: Mapping[str, float], peers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Our rate over that of the better peer, by cell, where we and at least one peer have a rate above 0.

    >>> ratio_to_best({"a": 6.0, "b": 1.0}, [{"a": 2.0}, {"a": 3.0}])
    {'a': 2.0}
    """
    best = {cell: max((peer.get(cell, 0.0) for peer in peers), default=0.0) for cell in ours}
    return {cell: rate / best[cell] for cell, rate in ours.items() if rate > 0 and best[cell] > 0}


def lowest(ratios: Mapping[str, float]) -> tuple[str, float] | None:
    """The cell with the lowest ratio.

    >>> lowest({"a": 2.0, "b": 1.5})
    ('b', 1.5)
    """
    return min(ratios.items(), key=lambda item: item[1]) if ratios else None


def worse(ours: Mapping[str, float], peers: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Cells where our latency is over the lowest of the peers': ours and theirs. A latency of 0 was not measured.

    >>> worse({"a": 5.0, "b": 5.0}, [{"a": 4.0, "b": 9.0}, {"a": 6.0, "b": 0.0}])
    {'a': (5.0, 4.0)}
    """
    found = {}
    for cell, latency in ours.items():
        measured = [peer[cell] for peer in peers if peer.get(cell, 0.0) > 0]
        if latency > 0 and measured and latency > min(measured):
            found[cell] = (latency, min(measured))
    return found


def deepest_fall(rates: Mapping[int, float]) -> tuple[int, float]:
    """Where throughput lies lowest under what fewer connections had reached: connections, and the share lost; (0, 0.0)
    where it never falls.

    >>> deepest_fall({1: 50.0, 8: 100.0, 64: 80.0, 256: 90.0})
    (64, 0.2)
    """
    peak, deepest = 0.0, (0, 0.0)
    for connections in sorted(rates):
        rate = rates[connections]
        if peak > rate and 1 - rate / peak > deepest[1]:
            deepest = (connections, round(1 - rate / peak, 9))
        peak = max(peak, rate)
    return deepest


def quotient(numerator: float | None, denominator: float | None) -> float | None:
    """None where either is missing or 0.

    >>> quotient(6.0, 3.0), quotient(None, 3.0), quotient(6.0, 0.0)
    (2.0, None, None)
    """
    return numerator / denominator if numerator and denominator else None
