"""What a run says in numbers, and what it is held to: every number here can be worked out by hand."""

import doctest
import importlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from loadtest.traffic.figures import Decision, decisions, faults, figures, scaling, timeline
from loadtest.traffic.objectives import Limits, judge, parse_p99
from loadtest.traffic.run import Replicas, Run
from loadtest.traffic.serve_api import Untold, ask, replicas
from tests.traffic.runs import Asked, run, scaled

LIMITS = Limits(p99_ms={"rag": 100.0}, error_rate=0.01, requests_per_s=1.0)


@pytest.mark.parametrize("module", ["objectives", "serve_api", "svg"])
def test_the_examples_in_the_docstrings_hold(module: str) -> None:
    ran = doctest.testmod(importlib.import_module(f"loadtest.traffic.{module}"))
    assert ran.attempted > 0 and ran.failed == 0


def hundred(folder: Path, faults: dict[int, str], latency_ms: float = 50.0) -> Run:
    """100 requests over 10 s, with faults at some."""
    asked: list[Asked] = [("rag", number / 10, latency_ms, faults.get(number)) for number in range(100)]
    return run(folder, asked, [(10.0, 4, None)])


def verdicts(found: Run, limits: Limits = LIMITS) -> dict[str, bool]:
    return {verdict.objective: verdict.met for verdict in judge(figures(found), limits)}


def test_rates_and_percentiles_are_of_right_answers(tmp_path: Path) -> None:
    asked: list[Asked] = [("rag", 1.0, float(ms), None) for ms in range(1, 102)]
    asked += [("rag", 1.0, 9000.0, "status: 503"), ("rag", 1.0, 9000.0, "norm: x"), ("mixed", 2.0, 8.0, None)]
    found = figures(run(tmp_path, asked, [(20.0, 4, None)]))
    rag = found["rag"]
    assert (rag.requests, rag.refused, rag.wrong) == (103, 1, 1) and rag.refused_rate == 1 / 103
    assert (rag.p50_ms, rag.p99_ms) == (51.0, 100.0)
    assert (rag.requests_per_s, rag.texts_per_s, rag.tokens_per_s) == pytest.approx((5.05, 10.1, 50.5))
    assert found[""].requests == 104 and found["mixed"].p99_ms == 8.0


def test_a_right_run_meets_everything(tmp_path: Path) -> None:
    assert verdicts(hundred(tmp_path, {})) == {
        "no wrong answers": True,
        "at most 1.00% refused": True,
        "at least 1 right answers/s": True,
        "p99 of rag at most 100 ms": True,
    }


@pytest.mark.parametrize(
    ("faults", "latency_ms", "missed"),
    [
        ({7: "vector: x"}, 50.0, ["no wrong answers"]),
        ({7: "status: 503"}, 50.0, []),
        ({7: "status: 503", 8: "connection: x"}, 50.0, ["at most 1.00% refused"]),
        ({}, 100.0, []),
        ({}, 100.1, ["p99 of rag at most 100 ms"]),
        # Nothing right at all: there is no p99 to be kept to.
        (
            dict.fromkeys(range(100), "status: 503"), 50.0,
            ["at most 1.00% refused", "at least 1 right answers/s", "p99 of rag at most 100 ms"],
        ),
    ],
)  # fmt: skip
def test_each_objective_is_missed_by_itself(
    tmp_path: Path, faults: dict[int, str], latency_ms: float, missed: list[str]
) -> None:
    found = verdicts(hundred(tmp_path, faults, latency_ms))
    assert [objective for objective, met in found.items() if not met] == missed


def test_throughput_is_of_right_answers_over_the_whole_run(tmp_path: Path) -> None:
    ninety_nine = hundred(tmp_path, {3: "status: 503"})
    for rate, met in ((9.9, True), (9.91, False)):
        limits = Limits(p99_ms={}, error_rate=1.0, requests_per_s=rate)
        # The last answer comes within the run's 10 s.
        assert verdicts(ninety_nine, limits)[f"at least {rate:g} right answers/s"] is met


def test_a_run_that_asked_nothing_is_not_met(tmp_path: Path) -> None:
    found = verdicts(run(tmp_path, [], [(10.0, 4, None)]))
    assert not found["at most 1.00% refused"] and not found["at least 1 right answers/s"]
    assert "p99 of rag at most 100 ms" not in found, "nobody asked, so nothing was late"


def test_an_objective_for_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="no kind of user called 'raq'; there are rag"):
        parse_p99("raq=9", {"rag": 100.0})
    with pytest.raises(ValueError, match="the p99 of rag must be a number of milliseconds, not 'soon'"):
        parse_p99("rag=soon", {"rag": 100.0})


def test_reasons_are_counted(tmp_path: Path) -> None:
    found = hundred(tmp_path, {1: "norm: x", 2: "status: 503", 3: "status: 503"})
    assert faults(found) == [("rag", "status: 503", 2), ("rag", "norm: x", 1)]


def test_over_time(tmp_path: Path) -> None:
    asked: list[Asked] = [
        ("rag", 0.5, 1000.0, None),  # from 0.5 to 1.5 s
        ("rag", 0.5, 200.0, None),
        ("mixed", 1.25, 500.0, None),  # from 1.25 to 1.75 s
        ("mixed", 2.0, 500.0, "status: 503"),
        ("mixed", 2.25, 500.0, "count: x"),
    ]
    line = timeline(run(tmp_path, asked, scaled((1, 1), (1, 2), (2, 2))))
    assert line.bucket_s == 1 and line.at_s.tolist() == [0.0, 1.0, 2.0]
    assert line.users.tolist() == [4, 4, 4]
    # Answers by when they came, latencies by when they were asked for.
    assert line.requests_per_s["rag"].tolist() == [1, 1, 0] and line.requests_per_s[""].tolist() == [1, 2, 0]
    assert line.tokens_per_s[""].tolist() == [10, 20, 0]
    np.testing.assert_array_equal(line.p50_ms["rag"], [600.0, np.nan, np.nan])
    np.testing.assert_allclose(line.p99_ms["rag"], [992.0, np.nan, np.nan])
    np.testing.assert_array_equal(line.p50_ms[""], [600.0, 500.0, np.nan])
    # Second by second: 0.5 + 0.2; 0.5 + 0.5; 0.5 + 0.5 seconds of waiting.
    np.testing.assert_allclose(line.in_flight, [0.7, 1.0, 1.0])
    assert line.refused_per_s.tolist() == [0, 0, 1] and line.wrong_per_s.tolist() == [0, 0, 1]
    assert line.running["Model"].tolist() == [1, 1, 2] and line.wanted["Model"].tolist() == [1, 2, 2]


def test_a_long_run_has_as_many_points_as_a_screen_shows(tmp_path: Path) -> None:
    line = timeline(run(tmp_path, [("rag", 3599.0, 10.0, None)], [(3600.0, 4, None)]))
    assert line.bucket_s == 15 and len(line.at_s) == 240 and line.requests_per_s[""][-1] == pytest.approx(1 / 15)


def test_decisions_are_changes_of_what_is_wanted(tmp_path: Path) -> None:
    found = run(tmp_path, [], scaled((1, 1), (1, 3), (2, 3), (3, 3), (3, 1), (2, 2), (1, 2)))
    assert decisions(found.samples) == [
        Decision(2.0, "Model", 1, 3), Decision(5.0, "Model", 3, 1), Decision(6.0, "Model", 1, 2)
    ]  # fmt: skip
    scale = scaling(found)["Model"]
    assert (scale.fewest, scale.most, scale.decisions, scale.turns) == (1, 3, 3, 2)
    assert scale.replica_s == 1 + 1 + 2 + 3 + 3 + 2


def test_where_serve_told_nothing_there_is_no_decision(tmp_path: Path) -> None:
    found = run(tmp_path, [], [(1.0, 4, None), *scaled((1, 1))[:1], (3.0, 4, None)])
    assert decisions(found.samples) == [] and timeline(found).running["Model"].size == 3
    assert scaling(run(tmp_path, [], [(1.0, 4, None)])) == {}


def test_serves_own_account_is_read() -> None:
    def deployment(wanted: int, *states: str) -> dict[str, object]:
        return {"target_num_replicas": wanted, "replicas": [{"state": state} for state in states]}

    model = deployment(3, "RUNNING", "STARTING", "STOPPING")
    one = {"embeddings": {"deployments": {"Ingress": deployment(1, "RUNNING"), "Model": model}}}
    assert replicas({"applications": one}) == {"Ingress": Replicas(1, 1), "Model": Replicas(1, 3)}
    two = one | {"other": {"deployments": {"Model": deployment(0)}}}
    assert list(replicas({"applications": two})) == ["embeddings/Ingress", "embeddings/Model", "other/Model"]
    assert replicas({"applications": {}}) == {}


class Dashboard(BaseHTTPRequestHandler):
    """Answers as Ray's does to whoever has the token."""

    def do_GET(self) -> None:
        known = self.headers["authorization"] == "Bearer right"
        found = self.path == "/api/serve/applications/"
        self.send_response(200 if known and found else 401 if found else 404)
        self.end_headers()
        self.wfile.write(b'{"applications": {}}')

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_dashboard_is_asked_with_the_token(dashboard: str) -> None:
    assert ask(f"{dashboard}/", "right") == {}


@pytest.mark.parametrize(("path", "token", "reason"), [("", None, "RAY_AUTH_TOKEN"), ("/x", "right", "status 404")])
def test_a_dashboard_that_does_not_tell_is_named_with_its_reason(
    dashboard: str, path: str, token: str | None, reason: str
) -> None:
    with pytest.raises(Untold, match=reason):
        ask(f"{dashboard}{path}", token)


def test_where_no_dashboard_listens_nobody_tells() -> None:
    with pytest.raises(Untold, match="ConnectionRefusedError"):
        ask("http://127.0.0.1:1")
