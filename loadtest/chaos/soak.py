"""`python -m loadtest.chaos.soak`: a kill a minute for an hour of mixed load, and what the processes hold meanwhile.

Ends with status 1 where a request was not answered rightly, or a kill was not got over.
"""

import argparse
import itertools
import math
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path

import numpy as np
import psutil

from loadtest.chaos import table
from loadtest.chaos.faults import FAULTS
from loadtest.chaos.load import Load
from loadtest.chaos.service import Service, running
from loadtest.chaos.tally import tally
from loadtest.chaos.trial import calm, once

TITLE = """# Soak

A head and three nodes on one machine, models that sleep instead of computing, short texts, pairs, long texts and lists
from two kinds of client, one that tries nothing again and OpenAI's own; and a kill a minute.
"""
PERIOD_S = 60.0
# In this order, again and again: what is promised to lose nothing, and is over within the minute.
KILLS = ("model", "tokenizer", "model", "tokenizer", "model", "controller", "model", "tokenizer", "node")
# A process that lived for fewer samples says nothing of a slope.
LEAST_SAMPLES = 10
# The first samples of a process are its start.
SETTLED = 3

Samples = dict[tuple[str, int], list["Sample"]]


@dataclass(frozen=True, slots=True)
class Sample:
    """What a process held at a time in hours."""

    hour: float
    memory_mb: float  # that no other process shares
    files: int


def measure(service: Service, samples: Samples, hour: float) -> None:
    """Add a sample of each process, by its role and its number."""
    for process, role in service.processes().items():
        with suppress(psutil.Error):  # it ended
            sample = Sample(hour, process.memory_full_info().uss / 1e6, process.num_fds())
            samples.setdefault((role, process.pid), []).append(sample)


def slope_mb_an_hour(samples: Sequence[Sample]) -> float:
    """Of its memory, by least squares, its start left out.

    >>> round(slope_mb_an_hour([Sample(minute / 60, 100 + minute / 10, 9) for minute in range(30)]), 3)
    6.0
    """
    later = samples[SETTLED:]
    slope, _ = np.polyfit([each.hour for each in later], [each.memory_mb for each in later], 1)
    return float(slope)


def held(samples: Mapping[tuple[str, int], Sequence[Sample]]) -> str:
    """A row for each role: what those of its processes held that lived for long."""
    rows = [
        "| role | processes seen | that lived for long | memory MB at first, at last | slope MB an hour: median, most "
        "| open files: least, most, at last |",
        "|---" * 6 + "|",
    ]
    for role, group in itertools.groupby(sorted(samples.items()), key=lambda each: each[0][0]):
        every = [each for _, each in group]
        long = [each[SETTLED:] for each in every if len(each) >= LEAST_SAMPLES]
        if not long:
            rows.append(f"| {role} | {len(every)} | 0 | | | |")
            continue
        slopes = [slope_mb_an_hour(each) for each in every if len(each) >= LEAST_SAMPLES]
        first, last = (statistics.median(each[place].memory_mb for each in long) for place in (0, -1))
        files = [sample.files for each in long for sample in each]
        ends = max(each[-1].files for each in long)
        rows.append(
            f"| {role} | {len(every)} | {len(long)} | {first:.0f}, {last:.0f} | {statistics.median(slopes):+.1f}, "
            f"{max(slopes):+.1f} | {min(files)}, {max(files)}, {ends} |"
        )
    return "\n".join(rows)


def run(minutes: float, rate: float, logs: Path | None) -> tuple[str, bool]:
    """The tables, and whether nothing was lost."""
    samples: Samples = {}
    recovered: dict[str, list[float]] = {}
    kills = itertools.cycle(KILLS)
    with running(logs) as service, Load(service.url, rate) as load:
        usual_s = calm(load)
        started = time.monotonic()
        for turn in itertools.count(1):
            measure(service, samples, (time.monotonic() - started) / 3600)
            if time.monotonic() - started > minutes * 60:
                break
            name = next(kills)
            recovered.setdefault(name, []).append(once(FAULTS[name], service, load, usual_s))
            now = datetime.now().time().isoformat("seconds")
            lost = tally(load.records).details.total()
            print(f"soak: {now} {name} over after {recovered[name][-1]:.1f} s, {lost} not right so far", flush=True)
            time.sleep(max(0.0, started + turn * PERIOD_S - time.monotonic()))
    whole = tally(load.records)
    times = [
        f"{len(each)} x {name} (over after {statistics.median(each):.1f} s, at most {max(each):.1f})"
        for name, each in recovered.items()
    ]
    of_the_plain = {outcome: whole.of("raw", outcome) for outcome in ("right", "refused", "failed", "wrong")}
    text = "\n".join(
        (
            f"{minutes:g} minutes at {rate:g} requests/s. Killed: {', '.join(times)}.",
            "",
            f"- plain client: {whole.sent('raw'):,} sent; "
            + ", ".join(f"{count:,} {outcome}" for outcome, count in of_the_plain.items()),
            f"- OpenAI's client: {whole.sent('openai'):,} sent, {whole.surfaced} errors",
            f"- longest answer {whole.longest_s:.2f} s; not right: {dict(whole.details) or 'none'}",
            "",
            held(samples),
        )
    )
    return text, not whole.details and all(map(math.isfinite, itertools.chain(*recovered.values())))


def main() -> int:
    """Run and print; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.chaos.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=40.0, help="requests/s")
    parser.add_argument("--output", type=Path, help="a Markdown file to write")
    parser.add_argument("--logs", type=Path, help="a folder to copy Ray's logs to")
    options = parser.parse_args()
    text, kept = run(options.minutes, options.rate, options.logs)
    command = shlex.join(["python", "-m", "loadtest.chaos.soak", *sys.argv[1:]])
    section = f"{TITLE}\n{date.today()}, `{command}`: {table.machine()}.\n\n{text}\n"
    print(section)
    if options.output:
        options.output.write_text(section)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
