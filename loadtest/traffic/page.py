"""The report: one HTML page that needs nothing else, of one run or of two."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.traffic import panels, svg
from loadtest.traffic.figures import Figures, decisions, faults, figures, scaling, timeline
from loadtest.traffic.objectives import Verdict
from loadtest.traffic.run import Floats, Run

STYLE, SCRIPT = (Path(__file__).with_name(f"page.{ending}").read_text() for ending in ("css", "js"))
MOST_ROWS = 40


def render(runs: Sequence[Run], verdicts: Sequence[Verdict]) -> str:
    """The page of one run with its verdicts, or of two beside each other."""
    if len(runs) == 1:
        title = f"Load test of {runs[0].about['url']}, {runs[0].about['started']}"
        body = _one(runs[0], verdicts)
    else:
        title = f"Load tests of {' and '.join(run.about['started'] for run in runs)}"
        body = _two(runs[0], runs[1])
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _one(run: Run, verdicts: Sequence[Verdict]) -> str:
    line = timeline(run)
    met = all(verdict.met for verdict in verdicts)
    steps = decisions(run.samples)
    marks = [
        svg.Mark(step.at_s, f"{svg.clock(step.at_s)} {step.deployment}: {step.before} to {step.after}")
        for step in steps
    ]
    found = figures(run)
    parts = [
        f'<header><h1>Load test <b class="{"good" if met else "bad"}">{"passed" if met else "failed"}</b></h1>',
        f"{_facts(run)}{_notes(run)}</header>",
        _verdicts(verdicts),
        _charts(panels.of_one(line, run.about["limits"]["p99_ms"]), line.at_s, line.bucket_s, marks),
        "<h2>By kind of user</h2>",
        _table(
            ["", "requests", "refused", "wrong", "right/s", "texts/s", "tokens/s", "p50 ms", "p99 ms"],
            [[kind or "all", *_cells(each)] for kind, each in found.items()],
        ),
    ]
    if failed := faults(run):
        rows = [[kind, fault, f"{number:,}"] for kind, fault, number in failed[:MOST_ROWS]]
        parts += ["<h2>What was wrong</h2>", _table(["kind", "reason", "requests"], rows), _more(failed)]
    if scaled := scaling(run):
        rows = [
            [name, f"{each.fewest}", f"{each.most}", f"{each.replica_s:,.0f}", f"{each.decisions}", f"{each.turns}"]
            for name, each in scaled.items()
        ]
        heads = ["deployment", "fewest", "most", "replica-seconds", "decisions", "changes of direction"]
        parts += ["<h2>Replicas</h2>", _table(heads, rows)]
    if steps:
        rows = [
            [svg.clock(step.at_s), step.deployment, f"{step.before}", f"{step.after}"] for step in steps[:MOST_ROWS]
        ]
        parts += ["<h2>Scaling decisions</h2>", _table(["time", "deployment", "from", "to"], rows), _more(steps)]
    return "\n".join(parts)


def _two(first: Run, second: Run) -> str:
    bucket_s = max(timeline(run).bucket_s for run in (first, second))
    lines = [timeline(run, bucket_s) for run in (first, second)]
    at_s = max((line.at_s for line in lines), key=len)
    return "\n".join(
        [
            "<header><h1>Two load tests</h1>",
            *(
                f'<div class="run"><b style="color:{colour}">{letter}</b> {_facts(run)}</div>'
                for letter, colour, run in zip("AB", (panels.FIRST, panels.SECOND), (first, second), strict=True)
            ),
            "</header>",
            _charts(panels.of_two(*lines), at_s, bucket_s, []),
            "<h2>Differences</h2>",
            _table(["", "A", "B", "B to A"], differences(first, second)),
        ]
    )


def differences(first: Run, second: Run) -> list[list[str]]:
    """Rows of name, A, B and the change, of everything that two runs have in common."""
    found = [figures(run) for run in (first, second)]
    scaled = [scaling(run) for run in (first, second)]
    numbers: list[tuple[str, float, float]] = []

    def add(label: str, pair: Sequence[Any], field: str) -> None:
        numbers.append((label, getattr(pair[0], field), getattr(pair[1], field)))

    for label, field in (
        ("requests", "requests"), ("refused", "refused"), ("wrong answers", "wrong"),
        ("right answers/s", "requests_per_s"), ("texts/s", "texts_per_s"), ("tokens/s", "tokens_per_s"),
    ):  # fmt: skip
        add(label, [each[""] for each in found], field)
    for kind in (kind for kind in found[0] if kind in found[1]):
        for percentile in ("p50_ms", "p99_ms"):
            add(f"{percentile[:3]} of {kind or 'all'}, ms", [each[kind] for each in found], percentile)
    for name in (name for name in scaled[0] if name in scaled[1]):
        for label, field in (("most replicas", "most"), ("replica-seconds", "replica_s"), ("decisions", "decisions")):
            add(f"{name}: {label}", [each[name] for each in scaled], field)
    return [[name, _number(a), _number(b), _change(a, b)] for name, a, b in numbers]


def _change(before: float, after: float) -> str:
    if before == after:
        return "same"
    if not (before and np.isfinite(before) and np.isfinite(after)):
        return "-"
    return f"{after / before - 1:+.0%}" if abs(after / before) < 10 else f"x {after / before:.0f}"


def _facts(run: Run) -> str:
    about = run.about
    facts = {
        "service": about["url"],
        "started": about["started"],
        "shape": f"{about['shape']}, {about['duration_s']:g} s",
        "users": f"up to {about['users']:,}, {about['pacing']}: {', '.join(about['kinds'])}",
        "load from": f"{about['workers']} process{'es' if about['workers'] != 1 else ''}, Locust {about['locust']}",
    }
    return f'<p class="facts">{"".join(f"<span><i>{escape(k)}</i> {escape(v)}</span>" for k, v in facts.items())}</p>'


def _notes(run: Run) -> str:
    notes = run.notes if run.whole else [*run.notes, "The run was cut off before its end."]
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def _verdicts(verdicts: Iterable[Verdict]) -> str:
    cards = (
        f'<li class="{"good" if verdict.met else "bad"}"><b>{escape(verdict.measured)}</b>'
        f"<span>{escape(verdict.objective)}</span></li>"
        for verdict in verdicts
    )
    return f'<ul class="verdicts">{"".join(cards)}</ul>'


def _charts(shown: Sequence[svg.Panel], at_s: Floats, bucket_s: int, marks: Sequence[svg.Mark]) -> str:
    until_s = float(at_s[-1] + bucket_s)
    data = {
        "left": svg.LEFT / svg.WIDTH,
        "plot": svg.PLOT / svg.WIDTH,
        "width": svg.WIDTH,
        "values": [[_json(series.values) for series in panel.series] for panel in shown],
    }
    parts = ['<section class="charts">']
    for panel in shown:
        legend = "".join(
            f'<span><i style="background:{series.colour}"></i>{escape(series.name)} <b></b></span>'
            for series in panel.series
        )
        unit = f" <small>{escape(panel.unit)}</small>" if panel.unit else ""
        parts.append(f'<figure><figcaption><h3>{escape(panel.title)}{unit}</h3><div class="legend">{legend}</div>')
        parts.append(f"</figcaption>{svg.draw(panel, at_s, until_s, marks)}</figure>")
    parts.append(f'</section><script type="application/json" id="data">{json.dumps(data)}</script>')
    return "\n".join(parts)


def _json(values: Floats) -> list[float | None]:
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]


def _cells(each: Figures) -> list[str]:
    counts = [f"{each.requests:,}", f"{each.refused:,}", f"{each.wrong:,}"]
    rest = (each.requests_per_s, each.texts_per_s, each.tokens_per_s, each.p50_ms, each.p99_ms)
    return counts + [_number(value) for value in rest]


def _number(value: float) -> str:
    if not np.isfinite(value):
        return "-"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _more(rows: Sequence[Any]) -> str:
    return f"<p>and {len(rows) - MOST_ROWS:,} more</p>" if len(rows) > MOST_ROWS else ""
