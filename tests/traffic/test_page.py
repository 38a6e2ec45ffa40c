"""The report: one page that needs nothing else, and holds what it should."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from cluster.simulate.arrivals import recorded
from loadtest.traffic import report
from loadtest.traffic.figures import figures
from loadtest.traffic.objectives import Limits, judge
from loadtest.traffic.page import differences, render
from loadtest.traffic.run import Run, Writer, read
from loadtest.traffic.svg import Mark, Panel, Series, draw
from tests.traffic.runs import ABOUT, Asked, run, scaled, write

PANELS = ["Users", "Right answers", "Tokens", "Latency p99", "Latency p50", "Requests in flight", "Errors"]
ASKED: list[Asked] = [
    ("autocomplete", 0.5, 20.0, None),
    ("autocomplete", 1.5, 400.0, None),
    ("rag", 1.0, 80.0, "status: 503"),
    ("rag", 2.0, 90.0, None),
    ("rag", 2.5, 95.0, "vector: <b>"),
]
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Reader(HTMLParser):
    """Collects headings and cells, and fails where tags don't match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.text[tag][-1] += data


def read_page(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(picture)
    return reader


def page_of(found: Run) -> str:
    return render([found], judge(figures(found), Limits(**found.about["limits"])))


@pytest.fixture
def found(tmp_path: Path) -> Run:
    return run(tmp_path, ASKED, scaled((1, 1), (1, 2), (2, 2)))


def test_a_page_has_every_panel_and_table(found: Run) -> None:
    reader = read_page(page_of(found))
    titles = reader.text["h3"]
    assert len(titles) == len(PANELS) + 1 and titles[-1] == "Replicas of Model"
    assert all(title.startswith(panel) for title, panel in zip(titles, PANELS, strict=False))
    assert reader.text["h1"] == ["Load test failed"]
    assert reader.text["h2"] == ["By kind of user", "What was wrong", "Replicas", "Scaling decisions"]
    cells = reader.text["td"]
    assert "vector: <b>" in cells and "status: 503" in cells
    rows = reader.text["tr"]
    assert "Model12210" in rows, "fewest, most, replica-seconds, decisions, turns"
    assert "0:02Model12" in rows, "time, deployment, from, to"
    verdicts = dict(zip(reader.text["li"], reader.text["li"], strict=True))
    assert "400 msp99 of autocomplete at most 300 ms" not in verdicts  # of 20 and 400 ms it is 396.2
    assert "396 msp99 of autocomplete at most 300 ms" in verdicts


def test_a_page_needs_nothing_else(found: Run) -> None:
    page = page_of(found).replace(found.about["url"], "")
    assert "//" not in re.sub(r"// .*", "", page), "an address would be of something outside"
    assert not re.search(r"(?i)<(link|img|iframe)|\b(src|href)\s*=|@import|url\(", page)


def test_the_decision_stands_in_every_panel(found: Run) -> None:
    page = page_of(found)
    assert page.count('class="mark"') == page.count('<svg class="panel"') == len(PANELS) + 1
    assert "<title>0:02 Model: 1 to 2</title>" in page


def test_where_serve_told_nothing_the_page_says_so(tmp_path: Path) -> None:
    page = page_of(run(tmp_path, ASKED, [(1.0, 4, None)], notes=["Replicas are not known: <reason>"]))
    reader = read_page(page)
    assert "Replicas are not known: <reason>" in reader.text["p"]
    assert not any(title.startswith("Replicas") for title in reader.text["h3"])


def test_a_run_that_asked_nothing_has_a_page(tmp_path: Path) -> None:
    assert read_page(page_of(run(tmp_path, []))).text["h1"] == ["Load test failed"]


def test_of_a_run_that_was_cut_off_the_page_says_so(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a.jsonl.gz", ABOUT)
    writer.flush()
    assert "The run was cut off before its end." in read_page(page_of(read(writer.file))).text["p"]
    writer.close()


def test_what_comes_from_outside_is_text_on_the_page(tmp_path: Path) -> None:
    page = page_of(run(tmp_path, ASKED, url="http://x/<script>alert(1)</script>"))
    assert page.count("<script") == 2, "the page's own data and code"


def test_two_runs_lie_over_each_other(tmp_path: Path, found: Run) -> None:
    (tmp_path / "b").mkdir()
    faster = [(kind, at_s, latency_ms / 2, fault) for kind, at_s, latency_ms, fault in ASKED]
    other = run(tmp_path / "b", [*faster, ("mixed", 5.2, 30.0, None)], scaled((1, 1)))
    reader = read_page(render([found, other], []))
    assert reader.text["h1"] == ["Two load tests"] and "Replicas of Model running" in reader.text["h3"]
    assert reader.text["svg"] and len(reader.text["svg"]) == len(PANELS) + 1
    rows = {name: rest for name, *rest in differences(found, other)}
    assert rows["requests"] == ["5", "6", "+20%"]
    assert rows["p50 of autocomplete, ms"] == ["210", "105", "-50%"]
    assert rows["refused"] == ["1", "1", "same"]
    assert rows["Model: most replicas"] == ["2", "1", "-50%"] and "p50 of mixed, ms" not in rows


def panel(values: list[float], **changes: object) -> str:
    series = Series("one", "#123456", np.array(values), changes.pop("style", "line"))  # type: ignore[arg-type]
    return draw(Panel("P", "", [series], **changes), np.arange(len(values), dtype=float), float(len(values)))  # type: ignore[arg-type]


def test_a_line_goes_through_its_values() -> None:
    # Four points in the middle of their seconds, over a width of 1040 from 52 on; 0 is at 90, 2.16 (2 and 8 %) at 8.
    path = re.search(r'class="line"[^>]* d="([^"]*)"', panel([0.0, 2.0, np.nan, 2.16 / 1.08]))
    assert path and path[1] == "M182.0 90.0L442.0 14.1L962.0 14.1"


def test_a_value_alone_is_a_dot_and_a_long_gap_stays_empty() -> None:
    path = re.search(r'class="line"[^>]* d="([^"]*)"', panel([1.0, *[np.nan] * 20, 1.0, 1.0]))
    assert path and re.fullmatch(r"M\S+ \S+h\.1M\S+ \S+L\S+ \S+", path[1])


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[np.nan, np.nan], [0.0, 0.0], [5.0], [1e-3, 1e6]])
@pytest.mark.parametrize("style", ["line", "area", "step"])
def test_any_values_can_be_drawn(values: list[float], log: bool, style: str) -> None:
    drawn = draw(
        Panel("P", "", [Series("one", "#123456", np.array(values), style)], log=log, limits=[(3.0, "#f00")]),  # type: ignore[arg-type]
        np.arange(len(values), dtype=float),
        max(1.0, len(values)),
        [Mark(0.5, "<here>")],
    )
    ElementTree.fromstring(drawn)
    assert "nan" not in drawn and "inf" not in drawn


def test_a_run_can_be_replayed_by_the_simulator(tmp_path: Path, found: Run) -> None:
    report.write_trace(found, tmp_path / "trace.jsonl")
    replayed = recorded(tmp_path / "trace.jsonl")
    assert replayed.at_s.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0] and replayed.tokens.tolist() == [10] * 5
    first = json.loads((tmp_path / "trace.jsonl").read_text().splitlines()[0])
    assert first == {
        "arrival_s": 0.5, "kind": "autocomplete", "inputs": 2, "characters": 20, "tokens": 10, "latency_ms": 20.0
    }  # fmt: skip


def test_a_record_is_drawn_again_and_judged_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good.jsonl.gz", ASKED[:1], [(2.0, 4, None)])
    bad = write(tmp_path / "bad.jsonl.gz", ASKED, [(2.0, 4, None)])
    assert report.write(good) and not report.write(bad)
    assert "MISSED  no wrong answers: 1" in capsys.readouterr().out
    assert (tmp_path / "good.html").read_text() == page_of(read(good))
