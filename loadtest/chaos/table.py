"""The faults of a run as a Markdown table, what is promised beside what was seen."""

import math
import platform
import statistics
from collections.abc import Mapping
from importlib.metadata import version

import psutil

from loadtest.chaos.faults import FAULTS
from loadtest.chaos.tally import Seen, Tally, broken

TITLE = """# What the service survives

Made by `make chaos`: a cluster of several nodes on one machine, whose models sleep instead of computing, under load
from two kinds of client, a plain one that tries nothing again and OpenAI's own with its default of two further tries.
Every vector is held against the one that its text has.

Refused is a 429 or 503 with `retry-after` and OpenAI's error object; failed is anything else but a right answer. Errors
of OpenAI's client are those that its further tries did not hide. Recovered is when all replicas are back and the p99 is
as usual: median and longest.
"""
COLUMNS = (
    *("fault", "times", "promised", "kept", "sent", "right", "refused", "failed", "wrong"),
    *("OpenAI's client: sent, errors, wrong", "longest answer s", "recovered s"),
)


def table(seen: Mapping[str, Seen], skipped: Mapping[str, str], whole: Tally) -> str:
    """A row for each fault by its name, those that could not be done with the reason, and all requests of the run."""
    rows = [" | ".join(("", *COLUMNS, "")).strip(), "|---" * len(COLUMNS) + "|"]
    rows += [row(name, each) for name, each in seen.items()]
    for name, reason in skipped.items():
        rows.append(f"| {FAULTS[name].words} | 0 | {FAULTS[name].promise.words} | skipped: {reason} |" + " |" * 8)
    rows.append(f"| the whole run | | | | {numbers(whole)} | |")
    return "\n".join(rows)


def row(name: str, seen: Seen) -> str:
    """One fault's row."""
    fault = FAULTS[name]
    kept = "; ".join(broken(fault.promise, seen))
    median_s, longest_s = statistics.median(seen.recovered_s), max(seen.recovered_s)
    spread = f"{shown_s(median_s)}, {shown_s(longest_s)}" if seen.times > 1 else shown_s(longest_s)
    verdict = f"**no**: {kept}" if kept else "yes"
    promised = f"{fault.promise.words}; recovered within {fault.promise.within_s:.0f} s"
    return f"| {fault.words} | {seen.times} | {promised} | {verdict} | {numbers(seen.tally)} | {spread} |"


def numbers(tally: Tally) -> str:
    """The cells of what became of requests."""
    raw = " | ".join(f"{tally.of('raw', outcome):,}" for outcome in ("right", "refused", "failed", "wrong"))
    openai = f"{tally.sent('openai'):,}, {tally.surfaced}, {tally.of('openai', 'wrong')}"
    return f"{tally.sent('raw'):,} | {raw} | {openai} | {tally.longest_s:.2f}"


def shown_s(seconds: float) -> str:
    return f"{seconds:.1f}" if math.isfinite(seconds) else "not"


def machine() -> str:
    """Where and with what a run was."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("ray", "openai", "httpx"))
    memory_gb = psutil.virtual_memory().total / 1e9
    return (
        f"{psutil.cpu_count()} cores of {platform.machine()}, {memory_gb:.0f} GB, for the service and the load; "
        f"Python {platform.python_version()}, {packages}"
    )
