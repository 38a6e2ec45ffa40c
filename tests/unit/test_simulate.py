"""The simulator's laws: no request is lost, work is conserved, the same seed gives the same run; and times by hand."""

import doctest
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve.config import AutoscalingConfig

from cluster.serves_default import serves_default
from cluster.simulate import capacity, real
from cluster.simulate.arrivals import Arrivals, arrivals, recorded, shapes
from cluster.simulate.controller import Timeline
from cluster.simulate.replay import Run, configured, replay
from cluster.simulate.service import Costs, Service
from serve_app.autoscale import DrainTime

ROOT = Path(__file__).parents[2]
# A batch takes 1 s and a tenth a token, up to 2 s.
SLOW = Costs(launch_s=1.0, token_s=0.1, batch_tokens=10, start_s=5.0, notice_s=0.0, request_s=0.0)
SCALING = AutoscalingConfig(
    min_replicas=1,
    max_replicas=20,
    target_ongoing_requests=4,
    metrics_interval_s=1,
    look_back_period_s=5,
    upscale_delay_s=0,
    downscale_delay_s=30,
)


def test_the_examples_in_the_docstrings_hold() -> None:
    for module in (capacity, real):
        ran = doctest.testmod(module)
        assert ran.attempted > 0 and ran.failed == 0


def at(*requests: tuple[float, int]) -> Arrivals:
    return Arrivals(np.array([time for time, _ in requests], np.float64), np.array([size for _, size in requests]))


def run(load: Arrivals, costs: Costs = SLOW, replicas: int = 1) -> list[float]:
    service = Service(costs, load, replicas)
    service.run(0.0)
    return service.latency_s.round(6).tolist()


def test_a_free_replica_takes_what_waits_up_to_its_budget() -> None:
    # The first runs alone until 1.5; what came meanwhile leaves together then: 4 + 6 tokens, and then the last.
    assert run(at((0, 5), (0.5, 4), (1, 6), (1.2, 1))) == [1.5, 3.0, 2.5, 3.4]


def test_a_long_request_is_answered_with_its_last_piece() -> None:
    # Cut into equal pieces: 8 + 8 + 9 tokens.
    assert run(at((0, 25))) == [1.8 + 1.8 + 1.9]
    # The pieces are shared by two replicas; the third follows the first that is free.
    assert run(at((0, 25)), replicas=2) == [1.8 + 1.9]


def test_lanes_share_what_waits() -> None:
    # Each takes half of what waits, so ten tokens at a time are two batches of 1.5 s.
    assert run(at((0, 5), (0, 5)), replace(SLOW, lanes=2)) == [1.5, 1.5]


def test_two_replicas_work_side_by_side() -> None:
    assert run(at((0, 10), (0, 10), (0, 10)), replicas=2) == [2.0, 2.0, 4.0]


LOADS = st.lists(st.tuples(st.floats(0, 60), st.integers(1, 45)), min_size=1, max_size=80).map(
    lambda requests: at(*sorted(requests))
)


@settings(deadline=None)
@given(LOADS, st.integers(0, 3), st.integers(1, 3), st.floats(0, 20), st.integers(0))
def test_no_request_is_lost_whatever_comes_and_however_it_scales(
    load: Arrivals, begin: int, ingresses: int, start_s: float, seed: int
) -> None:
    scaling = SCALING.model_copy(update={"min_replicas": 0, "initial_replicas": begin, "downscale_delay_s": 3.0})
    costs = replace(SLOW, ingresses=ingresses, start_s=start_s, notice_s=1.0)
    made = replay("", load, costs, DrainTime(), scaling, seed)
    assert np.isfinite(made.latency_s).all()
    shortest = load.tokens / np.ceil(load.tokens / 10) * 0.1 + 1  # of equal pieces, side by side
    assert (made.latency_s >= shortest - 1e-9).all(), "faster than the engine"
    assert made.timeline.target[-1] == 0, "nobody is there to be answered any more"


@settings(deadline=None)
@given(LOADS, st.integers(1, 4))
def test_work_is_conserved(load: Arrivals, replicas: int) -> None:
    """The engines are busy for the time of all tokens and of as many launches as there were batches, and no longer."""
    service = Service(SLOW, load, replicas)
    service.run(0.0)
    assert service.batch_tokens == load.tokens.sum()
    assert service.batches >= np.ceil(load.tokens / 10).max()
    assert sum(replica.tokens for replica in service.replicas) == service.unanswered_requests == 0
    if replicas == 1:
        ended = (load.at_s + service.latency_s).max()
        busy_s = service.batches * 1.0 + load.tokens.sum() * 0.1
        assert ended <= load.at_s.max() + busy_s + 1e-6, "it idled while something waited"


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    load = arrivals(shapes(1, 4, 120)["spike"], 120, 5, spread=1.0, seed=3)
    first, second, other = (
        replay("", load, replace(SLOW, ingresses=3, notice_s=1.0), DrainTime(), SCALING, seed) for seed in (1, 1, 2)
    )
    assert np.array_equal(first.latency_s, second.latency_s) and first.timeline == second.timeline
    assert not np.array_equal(first.latency_s, other.latency_s)
    assert np.array_equal(load.at_s, arrivals(shapes(1, 4, 120)["spike"], 120, 5, spread=1.0, seed=3).at_s)


def test_a_step_is_met_and_left_again_with_one_turn() -> None:
    costs = Costs(batch_tokens=256, start_s=6.0)
    load = arrivals(shapes(0.25 * costs.rate / 11, 2 * costs.rate / 11, 240)["step"], 240, 11)
    made = replay("", load, costs, DrainTime(), SCALING, 0)
    line = made.timeline
    assert (line.target[0], line.target[-1], line.turns()) == (1, 1, 1)
    assert 3 <= max(line.running) <= 8
    late = made.latency_s[(load.at_s > 40 + 6 + 15) & (load.at_s < 120)]
    assert np.percentile(late, 99) < 0.25, "15 s after the replicas' start nothing waits any more"


@pytest.mark.parametrize("load", [0.3, 0.69, 0.71, 1.4, 3.45, 10.3])
def test_a_steady_heavy_tailed_load_never_makes_it_turn(load: float) -> None:
    costs = Costs(batch_tokens=256, start_s=6.0)
    mean = 11 * np.exp(1.0**2 / 2)
    steady = arrivals(shapes(load * costs.rate / mean, 0, 900)["steady"], 900, 11, spread=1.0)
    enough = int(np.ceil(load / 0.7))
    scaling = SCALING.model_copy(update={"downscale_delay_s": 60.0, "initial_replicas": enough})
    made = replay("", steady, costs, DrainTime(), scaling, 0)
    during = Timeline(target=made.timeline.target[:890])
    assert during.turns() <= 1
    assert enough <= min(during.target[60:]) and max(during.target) <= enough * 1.2 + 1


def test_serves_default_policy_runs_by_the_same_clock() -> None:
    """It wants as many as there are requests for; not before its delay, and at once where there is none."""
    scaling = SCALING.model_copy(update={"upscale_delay_s": 20.0, "target_ongoing_requests": 4.0})
    load = at(*((0.0, 10) for _ in range(200)))
    made = replay("", load, replace(SLOW, start_s=0.0), serves_default, scaling, 0)
    first = made.timeline.target.index(20)
    assert 20 <= made.timeline.at_s[first] <= 22 and set(made.timeline.target[:first]) == {1}


def test_what_a_recorded_run_asked_is_replayed(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    rows = [{"arrival_s": 107.5, "tokens": 4, "status": 200}, {"arrival_s": 107.0, "tokens": 5}]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "\n")
    load = recorded(file)
    assert load.at_s.tolist() == [0.0, 0.5] and load.tokens.tolist() == [5, 4]
    file.write_text("")
    with pytest.raises(ValueError, match="holds no requests"):
        recorded(file)


@pytest.mark.parametrize("name", sorted(shapes(1, 2, 100)))
def test_every_shape_stays_between_its_rates(name: str) -> None:
    load = arrivals(shapes(20, 80, 100)[name], 100, 11)
    assert (np.diff(load.at_s) >= 0).all() and load.at_s[0] >= 0 and load.at_s[-1] < 100
    least = 20 * 100 / 10 if name == "rare" else 20 * 100
    assert 0.9 * least <= len(load) <= 1.1 * 80 * 100
    assert set(load.tokens) == {11}


def test_turns_are_counted() -> None:
    assert Timeline(target=[1, 1, 3, 4, 4, 2, 2, 1]).turns() == 1
    assert Timeline(target=[2, 1, 2, 1]).turns() == 2
    assert Timeline(target=[2, 2]).turns() == 0


def test_pictures_are_written(tmp_path: Path) -> None:
    from cluster.simulate.plot import draw, draw_sweep

    kwargs, scaling = configured(ROOT / "serve_config.yaml", max_replicas=3)
    assert scaling.max_replicas == 3
    load = arrivals(shapes(5, 20, 30)["ramp"], 30, 5)
    made: Run = replay("ours", load, SLOW, DrainTime(**kwargs), scaling, 0)
    draw([made, made], "a ramp", tmp_path / "run.svg")
    draw_sweep({"one line": [made]}, "a ramp", tmp_path / "sweep.png")
    assert (tmp_path / "run.svg").read_text().count("<path") > 10 and (tmp_path / "sweep.png").stat().st_size > 5000
