"""`make chaos`: break the service in every way that is known, under load, and write down what became of the requests.

Ends with status 1 where a promise was not kept.
"""

import argparse
import shlex
import sys
import time
from datetime import date, datetime
from pathlib import Path

from loadtest.chaos import table
from loadtest.chaos.faults import FAULTS, SHORT, Fault
from loadtest.chaos.load import Load
from loadtest.chaos.service import running
from loadtest.chaos.tally import Seen, broken, shared_out, tally
from loadtest.chaos.trial import calm, once

# Requests without a right answer that are told one by one, to be found in the logs.
SHOWN = 40


def run(faults: list[Fault], repeat: int, rate: float, short: bool, logs: Path | None) -> tuple[str, bool]:
    """One fault after another; the table, and whether all promises were kept."""
    began: list[float] = []
    recovered: list[tuple[float, ...]] = []
    skipped: dict[str, str] = {}
    done: list[str] = []
    wall_s = time.time() - time.monotonic()
    with running(logs) as service:
        print(f"chaos: {service.url} runs, {rate:g} requests/s", flush=True)
        with Load(service.url, rate) as load:
            usual_s = calm(load)
            for fault in faults:
                if fault.needs_redis and not service.has_redis:
                    skipped[fault.name] = "redis-server is not installed"
                    continue
                began.append(time.monotonic())
                times = []
                for _ in range(1 if short else fault.a_round * repeat):
                    now = datetime.now().time().isoformat("milliseconds")
                    times.append(once(fault, service, load, usual_s))
                    print(f"chaos: {fault.name} at {now}: recovered after {times[-1]:.1f} s", flush=True)
                done.append(fault.name)
                recovered.append(tuple(times))
    shares = shared_out(load.records, began)
    seen = {name: Seen(tally(records), times) for name, times, records in zip(done, recovered, shares, strict=True)}
    for name, each in seen.items():
        for detail, count in each.tally.details.most_common():
            print(f"chaos: {name}: {count} x {detail}")
    for bad in [record for record in load.records if record.outcome != "right"][:SHOWN]:
        when = datetime.fromtimestamp(wall_s + bad.sent_s).time().isoformat("milliseconds")
        print(f"chaos: sent at {when}, over after {bad.latency_s:.2f} s: {bad.client} {bad.outcome}: {bad.detail}")
    print(f"chaos: the load's own process was at most {load.lag_s:.2f} s late with a request")
    kept = not any(broken(FAULTS[name].promise, each) for name, each in seen.items())
    return table.table(seen, skipped, tally(load.records)), kept


def main() -> int:
    """Run and print the table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.chaos", description=__doc__)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, metavar="NAME", help=", ".join(FAULTS))
    parser.add_argument("--short", action="store_true", help=f"once each, by default {', '.join(SHORT)}")
    parser.add_argument("--repeat", type=int, default=1, help="rounds of each fault; in one, everybody is met once")
    parser.add_argument("--rate", type=float, default=80.0, help="requests/s")
    parser.add_argument("--output", type=Path, help="a Markdown file to write")
    parser.add_argument("--append", action="store_true", help="keep the runs that the file holds")
    parser.add_argument("--logs", type=Path, help="a folder to copy Ray's logs to")
    options = parser.parse_args()
    names = options.faults or (SHORT if options.short else FAULTS)
    found, kept = run([FAULTS[name] for name in names], options.repeat, options.rate, options.short, options.logs)
    command = shlex.join(["python", "-m", "loadtest.chaos", *sys.argv[1:]])
    section = f"\n## {date.today()}: `{command}`\n\n{table.machine()}.\n\n{found}\n"
    print(section)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        before = options.output.read_text() if options.append and options.output.exists() else table.TITLE
        options.output.write_text(before + section)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
