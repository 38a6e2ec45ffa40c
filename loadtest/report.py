"""`python -m loadtest.report RESULTS.jsonl`: the Markdown report and the plot of a run, beside its raw results."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loadtest.summary import Stat, deepest_fall, geometric_mean, lowest, quotient, ratio_to_best, stat, worse

INFINITY = ("infinity-onnx", "infinity-torch")
OURS, PLAIN, RAW = "ours", "plain-serve", "raw-engine"
# Shapes that are measured over a range of connections.
GROWING = ("9w", "64w", "510w")
# Cores that others may keep busy before a measurement counts as disturbed; the bench itself needs up to 0.05.
FOREIGN_CPU = 0.15


class Results:
    """The raw results of one run, by system and cell over its rounds."""

    def __init__(self, lines: Sequence[str]) -> None:
        """`lines`: of the raw results; the first describes the run."""
        records: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.run = next(record for record in records if record["kind"] == "run")
        self.starts = [record for record in records if record["kind"] == "start"]
        self.failures = [record for record in records if record["kind"] == "failure"]
        self.cells: list[dict[str, Any]] = self.run["cells"]
        self._measures: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for record in records:
            if record["kind"] == "measure":
                self._measures.setdefault((record["system"], record["cell"]), []).append(record)
        self.systems = [
            name for name in (OURS, *INFINITY, PLAIN, RAW) if any(system == name for system, _ in self._measures)
        ]

    def rounds(self, system: str, cell: str) -> list[dict[str, Any]]:
        """The measurements of a system at a cell, a round each."""
        return self._measures.get((system, cell), [])

    def stat(self, system: str, cell: str, name: str) -> Stat | None:
        """A field over the rounds; None where it was not measured."""
        values = [record[name] for record in self.rounds(system, cell) if name in record]
        return stat(values) if values else None

    def medians(self, system: str, name: str) -> dict[str, float]:
        """A field's median by cell."""
        found = {cell["name"]: self.stat(system, cell["name"], name) for cell in self.cells}
        return {cell: value.median for cell, value in found.items() if value is not None}

    def disturbed(self) -> tuple[int, int]:
        """Measurements during which others kept the machine busy, and all for which that is known."""
        known = [
            record["foreign_cpu"] for found in self._measures.values() for record in found if "foreign_cpu" in record
        ]
        return sum(share > FOREIGN_CPU for share in known), len(known)

    def growth(self, system: str, shape: str, name: str) -> dict[int, float]:
        """A field's median by connections, over the cells of one text each."""
        medians = self.medians(system, name)
        return {
            cell["connections"]: medians[cell["name"]]
            for cell in self.cells
            if cell["name"] == f"{shape}-{cell['connections']}c" and cell["name"] in medians
        }


def number(value: float | None) -> str:
    """Three digits that count; a dash for what was not measured.

    >>> number(1234.5), number(12.345), number(0.04567), number(None)
    ('1,234', '12.3', '0.0457', '-')
    """
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plural(count: int, noun: str) -> str:
    """A count of things."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def spread(value: Stat | None) -> str:
    """A median, with its range where rounds differ."""
    if value is None:
        return "-"
    if value.low == value.high:
        return number(value.median)
    return f"{number(value.median)} ({number(value.low)}..{number(value.high)})"


def times(value: float | None) -> str:
    """A ratio."""
    return "not measured" if value is None else f"{value:.2f}x"


def summary(results: Results) -> list[str]:
    """What the run says, a line a question."""
    rates = {system: results.medians(system, "requests_per_s") for system in results.systems}
    p99 = {system: results.medians(system, "p99_ms") for system in results.systems}
    p50 = {system: results.medians(system, "p50_ms") for system in results.systems}
    tokens = {system: results.medians(system, "tokens_per_s") for system in (OURS, RAW)}
    peers = [name for name in INFINITY if name in rates]
    ours = rates.get(OURS, {})
    ratios = ratio_to_best(ours, [rates[name] for name in peers])
    least = lowest(ratios)
    slower = worse(p99.get(OURS, {}), [p99[name] for name in peers])
    fastest_p50 = min((p50[name]["9w-1c"] for name in peers if p50[name].get("9w-1c")), default=None)
    errors = sum(record["errors"] for cell in results.cells for record in results.rounds(OURS, cell["name"]))
    lines = [
        f"Requests/s over the better Infinity engine, geometric mean of {len(ratios)} cells: "
        f"{times(geometric_mean(list(ratios.values())))}",
        "The lowest of them: " + (f"{least[0]} with {times(least[1])}" if least else "not measured"),
        "Cells where our p99 is over the lower one of Infinity's: "
        + (", ".join(f"{cell} ({number(a)} over {number(b)} ms)" for cell, (a, b) in slower.items()) or "none"),
        "p50 of 9 words at 1 connection, ours over the lower one of Infinity's: "
        + times(quotient(p50.get(OURS, {}).get("9w-1c"), fastest_p50)),
        "Requests/s over plain-serve, 9 words at 32 connections: "
        + times(quotient(ours.get("9w-32c"), rates.get(PLAIN, {}).get("9w-32c"))),
    ]
    for cell, said in (("9w-64c", "9 words at 64 connections"), ("32x64w-4c", "lists of 32 x 64 words"),
                       ("mixed-2c", "mixed lists")):  # fmt: skip
        share = quotient(tokens[OURS].get(cell), tokens[RAW].get(cell))
        lines.append(
            f"Share of the raw engine's tokens/s, {said}: {'not measured' if share is None else f'{share:.0%}'}"
        )
    for shape in GROWING:
        growth = results.growth(OURS, shape, "requests_per_s")
        if len(growth) > 1:
            connections, lost = deepest_fall(growth)
            said = f"{lost:.1%} under its peak before, at {connections} connections" if lost else "never falls"
            lines.append(f"Our requests/s of {shape} over growing connections: {said}")
        tail = quotient(p99.get(OURS, {}).get(f"{shape}-256c"), p50.get(OURS, {}).get(f"{shape}-256c"))
        lines.append(f"Our p99 over p50, {shape} at 256 connections: {times(tail)}")
    lines.append(f"Our errors in all rounds: {errors}")
    disturbed, measured = results.disturbed()
    lines.append(
        f"Measurements during which other processes kept over {FOREIGN_CPU} of a core busy: {disturbed} of {measured}"
    )
    return [f"- {line}" for line in lines]


def cell_table(results: Results, cell: dict[str, Any]) -> list[str]:
    """All systems at one cell."""
    name, (low, high) = cell["name"], cell["words"]
    words = f"{low}" if low == high else f"{low} to {high}"
    texts = f"one text of {words} words" if cell["rows"] == 1 else f"lists of {cell['rows']:,} texts of {words} words"
    columns: list[tuple[str, Callable[[str], str]]] = [
        (head, lambda system, field=field: spread(results.stat(system, name, field)))  # type: ignore[misc]
        for head, field in (
            ("requests/s", "requests_per_s"), ("texts/s", "texts_per_s"), ("tokens/s", "tokens_per_s"),
            ("p50 ms", "p50_ms"), ("p99 ms", "p99_ms"),
        )
    ]  # fmt: skip
    columns += [
        ("errors", lambda system: str(sum(record["errors"] for record in results.rounds(system, name)))),
        ("CPU ms/request", lambda system: cpu(results.rounds(system, name))),
        ("memory MB", lambda system: number(_median(results.stat(system, name, "memory_mb")))),
        ("wrk's CPU", lambda system: _percent(results.stat(system, name, "wrk_cpu"))),
    ]
    rows = [
        [system, *(render(system) for _, render in columns)]
        for system in results.systems
        if results.rounds(system, name)
    ]
    if not rows:
        return []
    title = f"### {name}: {texts}, {plural(cell['connections'], 'connection')}, {cell['encoding']}"
    return [title, "", *table(["system", *(head for head, _ in columns)], rows), ""]


def cpu(rounds: Sequence[dict[str, Any]]) -> str:
    """Milliseconds of CPU a request: the sum, and its larger parts where processes are told apart."""
    parts: dict[str, list[float]] = {}
    for record in rounds:
        for role, spent in record.get("cpu_ms", {}).items():
            parts.setdefault(role, []).append(spent)
    medians = {role: stat(values).median for role, values in parts.items()}
    total = sum(medians.values())
    shown = sorted(((role, spent) for role, spent in medians.items() if spent >= 0.01 * total), key=lambda x: -x[1])
    if len(medians) < 2:
        return number(total) if medians else "-"
    return f"{number(total)}: " + ", ".join(f"{role} {number(spent)}" for role, spent in shown)


def _median(value: Stat | None) -> float | None:
    return value.median if value else None


def _percent(value: Stat | None) -> str:
    return f"{value.median:.0%}" if value else "-"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def markdown(results: Results, plot: str) -> str:
    """The whole report; `plot` is the file name of the picture."""
    run, machine = results.run, results.run["machine"]
    versions = {system: start["versions"] for start in results.starts for system in [start["system"]]}
    infinity = next((versions[name] for name in INFINITY if name in versions), {})
    rates = {system: results.medians(system, "requests_per_s") for system in results.systems}
    peers = [rates[name] for name in INFINITY if name in rates]
    ratios = ratio_to_best(rates.get(OURS, {}), peers)
    heads = [*results.systems, "ours over the better Infinity"]
    overview = [
        [cell["name"], *(number(rates[system].get(cell["name"])) for system in results.systems),
         times(ratios[cell["name"]]) if cell["name"] in ratios else "-"]
        for cell in results.cells
    ]  # fmt: skip
    starts = [
        [system, spread(stat([start["seconds"] for start in starts])), f"{min(s['cosine'] for s in starts):.6f}"]
        for system in results.systems
        if (starts := [start for start in results.starts if start["system"] == system])
    ]
    return "\n".join(
        [
            f"# Benchmark of {run['date']}", "",
            f"- Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, Linux "
            f"{machine['kernel']}" + (f", {machine['gpu']}" if "gpu" in machine else ""),
            "- Versions: " + ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
            *(["- Infinity's: " + ", ".join(f"{name} {v}" for name, v in infinity.items())] if infinity else []),
            f"- Command: `{run['command']}`, {plural(run['rounds'], 'round')}",
            "",
            "Numbers are medians over the rounds, with their range in brackets. All systems serve the same weights on "
            "the same machine, one after another within each round. Latencies are those of wrk, which corrects them "
            "for coordinated omission; `raw-engine` is the service's engine without a server, and its latency that of "
            "one batch. Memory is the peak of the processes' unique set sizes.",
            "",
            f"![requests/s, p99 and ratios]({plot})", "",
            "## Summary", "", *summary(results), "",
            *[f"- FAILED in round {f['round'] + 1}: {f['system']}: {f['reason'].splitlines()[0]}"
              for f in results.failures],
            "", "Requests/s:", "", *table(["cell", *heads], overview), "",
            "Seconds to the first vector, and the lowest cosine to vectors by definition (a short, a usual, and a cut "
            "text):", "", *table(["system", "start s", "cosine"], starts), "",
            "## Cells", "",
            *[line for cell in results.cells for line in cell_table(results, cell)],
        ]
    )  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Render the raw results that are named."""
    from loadtest import plot  # matplotlib takes a second to import, which reading results does not need

    for name in arguments:
        source = Path(name)
        results = Results(source.read_text().splitlines())
        plot.draw(results, source.with_suffix(".png"))
        source.with_suffix(".md").write_text(markdown(results, source.with_suffix(".png").name) + "\n")
        print("\n".join([*summary(results), f"report: {source.with_suffix('.md')}"]))


if __name__ == "__main__":
    main(sys.argv[1:])
