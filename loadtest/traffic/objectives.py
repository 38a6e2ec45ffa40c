"""What a run is held to, and whether it kept to it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from loadtest.traffic.figures import Figures


@dataclass(frozen=True, slots=True)
class Limits:
    """The objectives of a run: p99 of each kind, the share of requests that may be refused, and right answers/s."""

    p99_ms: dict[str, float]
    error_rate: float
    requests_per_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """One objective, in words, and whether it was met."""

    objective: str
    measured: str
    met: bool

    def as_json(self) -> dict[str, Any]:
        """For the record of the run."""
        return asdict(self)


def judge(figures: Mapping[str, Figures], limits: Limits) -> list[Verdict]:
    """Every objective; `figures` are those of each kind that asked, and of all together under ''.

    A wrong answer is never within the limits: whoever gets one stores it and never learns of it.
    """
    everything = figures[""]
    verdicts = [
        Verdict("no wrong answers", f"{everything.wrong:,}", everything.wrong == 0),
        Verdict(
            f"at most {limits.error_rate:.2%} refused",
            f"{everything.refused_rate:.2%}",
            everything.refused_rate <= limits.error_rate,
        ),
        Verdict(
            f"at least {limits.requests_per_s:g} right answers/s",
            f"{everything.requests_per_s:.1f}",
            everything.requests_per_s >= limits.requests_per_s,
        ),
    ]
    for kind, limit_ms in limits.p99_ms.items():
        if kind in figures:
            p99_ms = figures[kind].p99_ms
            verdicts.append(Verdict(f"p99 of {kind} at most {limit_ms:,g} ms", f"{p99_ms:,.0f} ms", p99_ms <= limit_ms))
    return verdicts


def parse_p99(text: str, defaults: Mapping[str, float]) -> dict[str, float]:
    """Objectives as given on the command line, over the defaults; raises ValueError.

    >>> parse_p99("rag=900", {"rag": 1000.0, "mixed": 1500.0})
    {'rag': 900.0, 'mixed': 1500.0}
    """
    limits = dict(defaults)
    for part in filter(None, text.split(",")):
        kind, _, limit = part.partition("=")
        if kind not in defaults:
            raise ValueError(f"there is no kind of user called {kind!r}; there are {', '.join(defaults)}")
        try:
            limits[kind] = float(limit)
        except ValueError:
            raise ValueError(f"the p99 of {kind} must be a number of milliseconds, not {limit!r}") from None
    return limits
