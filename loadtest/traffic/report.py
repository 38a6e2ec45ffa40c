"""`python -m loadtest.traffic.report RUN [OTHER]`: draw a run again, or two over each other, or write its requests."""

import argparse
import json
import sys
from pathlib import Path

from loadtest.traffic import page
from loadtest.traffic.figures import figures
from loadtest.traffic.objectives import Limits, judge
from loadtest.traffic.run import Run, read


def write(file: Path) -> bool:
    """Write the page of a run beside its record, and say whether it met its objectives."""
    run = read(file)
    verdicts = judge(figures(run), Limits(**run.about["limits"]))
    target = file.with_name(f"{file.name.removesuffix('.jsonl.gz')}.html")
    target.write_text(page.render([run], verdicts))
    for verdict in verdicts:
        print(f"{'met   ' if verdict.met else 'MISSED'}  {verdict.objective}: {verdict.measured}")
    print(f"report: {target}", flush=True)
    return all(verdict.met for verdict in verdicts)


def write_trace(run: Run, file: Path) -> None:
    """Write the requests that were answered, by arrival, a JSON object a line: what a simulator replays.

    Of what was refused the tokens are not known, so it is left out.
    """
    asked = run.requests.where(run.requests.tokens > 0)
    columns = (asked.at_s, asked.kind, asked.inputs, asked.characters, asked.tokens, asked.latency_ms)
    names = ("arrival_s", "kind", "inputs", "characters", "tokens", "latency_ms")
    with file.open("w") as out:
        for row in zip(*(column.tolist() for column in columns), strict=True):
            out.write(json.dumps(dict(zip(names, row, strict=True))) + "\n")


def main() -> int:
    """Draw what is named."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.traffic.report", description=__doc__)
    parser.add_argument("run", type=Path, help="the record of a run, .jsonl.gz")
    parser.add_argument("other", type=Path, nargs="?", help="a second one, to compare it with")
    parser.add_argument("--out", type=Path, help="the page of a comparison; beside the second record if not given")
    parser.add_argument("--trace", type=Path, help="write the run's requests to this file instead, a JSON line each")
    options = parser.parse_args()
    try:
        if options.trace is not None:
            write_trace(read(options.run), options.trace)
            return 0
        if options.other is None:
            return 0 if write(options.run) else 1
        runs = [read(options.run), read(options.other)]
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    stems = [file.name.removesuffix(".jsonl.gz") for file in (options.run, options.other)]
    target = options.out or options.other.with_name(f"{stems[0]}-and-{stems[1]}.html")
    target.write_text(page.render(runs, []))
    print(f"report: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
