"""Which panels a page shows of one run, or of two over each other."""

import numpy as np

from loadtest.traffic.figures import Timeline
from loadtest.traffic.kinds import KINDS
from loadtest.traffic.run import Floats
from loadtest.traffic.svg import Panel, Series, Style

# Okabe and Ito's colours, which the colour-blind tell apart, too.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#999999")
FIRST, SECOND, BAD = "#0072b2", "#d55e00", "#d62728"
LATENCY_PX, REPLICAS_PX = 150, 76


def colour(kind: str) -> str:
    """Every kind has its colour in all panels."""
    names = list(KINDS)
    return COLOURS[names.index(kind)] if kind in names else COLOURS[-1]


def of_one(line: Timeline, p99_limits_ms: dict[str, float]) -> list[Panel]:
    """Rates and latencies by kind; replicas of each deployment in a panel of its own, so that none hides another."""
    kinds = [kind for kind in line.p99_ms if kind]

    def by_kind(values: dict[str, Floats], style: Style) -> list[Series]:
        return [Series(kind, colour(kind), values[kind], style) for kind in kinds]

    limits = [(limit, colour(kind)) for kind, limit in p99_limits_ms.items() if kind in kinds]
    return [
        Panel("Users", "", [Series("users", FIRST, line.users, "area")], 80),
        Panel("Right answers", "per second", by_kind(line.requests_per_s, "area")),
        Panel("Tokens", "per second", by_kind(line.tokens_per_s, "area"), 90),
        Panel("Latency p99", "ms, dashed its objective", by_kind(line.p99_ms, "line"), LATENCY_PX, True, limits),
        Panel("Latency p50", "ms", by_kind(line.p50_ms, "line"), LATENCY_PX, True),
        Panel("Requests in flight", "queued or under way", [Series("requests", FIRST, line.in_flight, "area")], 90),
        Panel(
            "Errors",
            "per second" if line.wrong_per_s.any() or line.refused_per_s.any() else "none",
            [
                Series("wrong answers", BAD, line.wrong_per_s, "area"),
                Series("refused", COLOURS[1], line.refused_per_s, "area"),
            ],
            80,
        ),
        *(
            Panel(
                f"Replicas of {name}",
                "",
                [
                    Series("running", COLOURS[2], running, "area"),
                    Series("wanted", "currentColor", line.wanted[name], "dashed step"),
                ],
                REPLICAS_PX,
            )
            for name, running in line.running.items()
        ),
    ]  # fmt: skip


def of_two(first: Timeline, second: Timeline) -> list[Panel]:
    """Everything together, both runs in each panel."""
    nothing = np.zeros(0)
    errors = [line.wrong_per_s + line.refused_per_s for line in (first, second)]

    def pair(title: str, unit: str, one: Floats, other: Floats, height: int = 110, log: bool = False) -> Panel:
        style: Style = "step" if title.startswith(("Replicas", "Users")) else "line"
        points = max(len(first.at_s), len(second.at_s))
        both = [np.pad(each, (0, points - len(each)), constant_values=np.nan) for each in (one, other)]
        series = [Series("A", FIRST, both[0], style), Series("B", SECOND, both[1], style)]
        return Panel(title, unit, series, height, log)

    return [
        pair("Users", "", first.users, second.users, 80),
        pair("Right answers", "per second", first.requests_per_s[""], second.requests_per_s[""]),
        pair("Tokens", "per second", first.tokens_per_s[""], second.tokens_per_s[""], 90),
        pair("Latency p99", "ms", first.p99_ms[""], second.p99_ms[""], LATENCY_PX, True),
        pair("Latency p50", "ms", first.p50_ms[""], second.p50_ms[""], LATENCY_PX, True),
        pair("Requests in flight", "queued or under way", first.in_flight, second.in_flight, 90),
        pair("Errors", "per second", errors[0], errors[1], 80),
        *(
            pair(
                f"Replicas of {name}", "running",
                first.running.get(name, nothing), second.running.get(name, nothing), REPLICAS_PX,
            )
            for name in dict.fromkeys([*first.running, *second.running])
        ),
    ]  # fmt: skip
