"""The policy by hand-worked numbers, and inside Serve's own controller state: how metrics get there, delays, bounds."""

import math
import random
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.autoscaling_state import ApplicationAutoscalingState
from ray.serve._private.common import DeploymentID, ReplicaID, ReplicaMetricReport, TimeStampedValue
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from serve_app.autoscale import HYSTERESIS, RATE, STEP, WAITING, DrainTime, asked_of, decide, waiting_for

ROOT = Path(__file__).parents[2]
INGRESS, MODEL = DeploymentID("Ingress", "app"), DeploymentID("Model", "app")


@pytest.mark.parametrize(
    ("flow", "queue", "target", "peak", "wanted"),
    [
        (0.0, 0.0, 1, 0.0, (0, 0.0)),
        (0.0, 0.01, 0, 0.0, (1, 0.0)),
        (0.6, 0.4, 1, 0.0, (1, 0.0)),
        (0.6, 0.41, 1, 0.0, (2, 0.0)),
        (2.0, 7.0, 1, 0.0, (4, 0.0)),  # a step at most
        (2.0, 7.0, 4, 0.0, (9, 0.0)),
        (1.7, 0.0, 2, 0.0, (2, 0.0)),  # under two, but not by enough
        (1.6, 0.0, 3, 0.0, (2, 1.6)),
        (0.1, 0.0, 3, 1.6, (2, 1.6)),  # this much came while there were three
        (0.1, 1.5, 9, 0.0, (2, 0.1)),
        (0.1, 0.0, 9, 0.1, (2, 0.1)),  # what waited is done; a step at most
        (0.0, 0.0, 3, 0.0, (0, 0.0)),
    ],
)
def test_decisions_by_hand(flow: float, queue: float, target: int, peak: float, wanted: tuple[int, float]) -> None:
    assert decide(flow, queue, target, peak) == wanted


@given(st.floats(0, 1e9), st.floats(0, 1e9), st.integers(0, 10_000), st.floats(0, 1e4))
def test_a_decision_carries_the_need_and_steps_no_further_than_it_may(
    flow: float, queue: float, target: int, peak: float
) -> None:
    wanted, _ = decide(flow, queue, target, min(peak, max(0, target - 1) / (1 + HYSTERESIS)))
    assert target // STEP <= wanted <= max(target, 1) * STEP
    assert wanted >= min(flow + queue, max(target, 1) * STEP)
    if wanted < target:
        assert (flow + queue) * (1 + HYSTERESIS) <= wanted + 1e-9


@given(st.floats(0.1, 50), st.floats(0, 0.15), st.sampled_from([1, 5, 60]), st.integers(0))
def test_a_steady_noisy_load_never_makes_it_turn(load: float, noise: float, target: int, seed: int) -> None:
    """An hour of decisions with Serve's delay of 60 s for fewer, two a second."""
    shake = random.Random(seed)
    targets, peak, below_since = [target], 0.0, math.inf
    for tick in range(7200):
        wanted, peak = decide(load * shake.uniform(1 - noise, 1 + noise), 0.0, target, peak)
        below_since = min(below_since, tick) if wanted < target else math.inf
        if wanted > target or tick - below_since >= 120:
            target, peak, below_since = wanted, 0.0, math.inf
            targets.append(target)
    rises = [after > before for before, after in pairwise(targets)]
    assert len(set(rises)) <= 1, targets
    assert load <= target <= math.ceil(load * (1 + noise) * (1 + HYSTERESIS))


class App:
    """Serve's own autoscaling state of an application, fed with reports as replicas send them."""

    def __init__(self, bounds: tuple[int, int] = (0, 20), **kwargs: float) -> None:
        self.state = ApplicationAutoscalingState("app")
        self.state.register(AutoscalingPolicy(policy_function="serve_app.autoscale:DrainTime", policy_kwargs=kwargs))
        for deployment, (least, most) in ((INGRESS, (1, 4)), (MODEL, bounds)):
            scaling = AutoscalingConfig(
                min_replicas=least,
                max_replicas=most,
                target_ongoing_requests=10,
                upscale_delay_s=0,
                downscale_delay_s=0,
            )
            config = DeploymentConfig(autoscaling_config=scaling)
            info = DeploymentInfo(config, None, start_time_ms=0, deployer_job_id="")  # type: ignore[arg-type]
            self.state.register_deployment(deployment, info, 1)

    def report(self, deployment: DeploymentID, *replicas: dict[str, tuple[float, ...]]) -> None:
        """Each replica's measurements, a second apart; these replicas are the running ones."""
        now, ids = time.time(), [ReplicaID(str(number), deployment) for number in range(len(replicas))]
        self.state.update_running_replica_ids(deployment, ids)
        for replica, metrics in zip(ids, replicas, strict=True):
            series = {
                name: [TimeStampedValue(now - len(values) + place, value) for place, value in enumerate(values)]
                for name, values in metrics.items()
            }
            self.state.record_request_metrics_for_replica(ReplicaMetricReport(replica, series, now))

    def decide(self, ingresses: int = 1, models: int = 1) -> dict[DeploymentID, int]:
        return self.state.get_decision_num_replicas({INGRESS: ingresses, MODEL: models})


ASKED, HELD = asked_of("Model"), waiting_for("Model")


def test_the_need_of_a_model_is_what_arrives_and_what_waits() -> None:
    app = App(target_drain_s=4, target_utilization=0.5)
    # 300 tokens/s arrive at each of two ingresses; 1,000 wait there, and 600 at the replicas, which do 500 a second.
    app.report(INGRESS, {ASKED: (100, 500, 700), HELD: (9, 400)}, {ASKED: (0, 300, 600), HELD: (600,)})
    app.report(MODEL, {WAITING: (0, 200), RATE: (400,)}, {WAITING: (400,), RATE: (600,)})
    # (600 + 1,600 / 4) / (500 * 0.5) = 4
    assert app.decide(models=2) == {INGRESS: 1, MODEL: 4}
    assert app.decide(models=4)[MODEL] == 4
    assert app.decide(models=5)[MODEL] == 5  # as 4 * 1.2 is over four
    assert app.decide(models=6)[MODEL] == 5


def test_a_model_at_zero_is_woken_by_what_is_held_for_it() -> None:
    app = App()
    app.report(MODEL)
    app.report(INGRESS, {ASKED: (10, 10), HELD: (0, 0)})
    assert app.decide(models=0)[MODEL] == 0
    app.report(INGRESS, {ASKED: (10, 14), HELD: (0, 4)})
    assert app.decide(models=0)[MODEL] == 1


def test_a_model_at_zero_whose_rate_was_known_starts_with_as_many_replicas_as_it_takes() -> None:
    app = App(target_drain_s=1, target_utilization=1)
    app.report(MODEL, {WAITING: (0, 0), RATE: (100, 100)})
    app.report(INGRESS, {ASKED: (0, 0), HELD: (0, 0)})
    assert app.decide()[MODEL] == 0
    app.report(MODEL)
    app.report(INGRESS, {ASKED: (0, 100), HELD: (0, 100)})
    assert app.decide(models=0)[MODEL] == 2


def test_the_ingress_follows_its_use_of_a_core_and_not_what_it_has_open() -> None:
    app = App(target_utilization=0.5)
    own = asked_of("Ingress")
    app.report(MODEL, {WAITING: (0, 0), RATE: (100, 100)})
    app.report(INGRESS, {"running_requests": (900, 900), own: (5.0, 5.1), RATE: (1.0, 1.0)})
    assert app.decide()[INGRESS] == 1
    app.report(INGRESS, {"running_requests": (9, 9), own: (5.0, 5.9), RATE: (1.0, 1.0)})
    assert app.decide()[INGRESS] == 2


def test_before_it_has_reported_the_ingress_follows_serves_own_signal() -> None:
    app = App()
    app.report(MODEL, {WAITING: (0, 0), RATE: (100, 100)})
    app.report(INGRESS, {"running_requests": (25, 25, 25), ASKED: (0, 0), HELD: (0, 0)})
    assert app.decide()[INGRESS] == 3


def test_without_reports_of_work_a_model_follows_serves_own_signal_and_loses_no_replica_that_it_had() -> None:
    app = App()
    app.report(INGRESS, {})
    app.report(MODEL, {"running_requests": (35, 35)})
    assert app.decide()[MODEL] == 4
    app.report(INGRESS, {ASKED: (0, 300), HELD: (0, 0)})
    app.report(MODEL, {WAITING: (0, 0), RATE: (100, 100)})
    assert app.decide(models=4)[MODEL] == 5
    app.report(MODEL, {})
    app.report(INGRESS, {})
    assert app.decide(models=5)[MODEL] == 5


def test_serves_bounds_hold() -> None:
    app = App(bounds=(2, 3))
    app.report(INGRESS, {ASKED: (0, 10_000), HELD: (0, 0)})
    app.report(MODEL, {WAITING: (0, 0), RATE: (100, 100)})
    assert app.decide(models=2)[MODEL] == 3
    app.report(INGRESS, {ASKED: (10_000, 10_000), HELD: (0, 0)})
    assert app.decide(models=3)[MODEL] == 2


GARBAGE = st.one_of(
    st.none(), st.booleans(), st.floats(), st.integers(), st.text(max_size=2), st.lists(st.integers(), max_size=2)
)
SERIES = st.one_of(
    GARBAGE,
    st.lists(st.builds(SimpleNamespace, timestamp=GARBAGE, value=GARBAGE), max_size=3),
    st.lists(st.builds(SimpleNamespace), max_size=1),
)
METRICS = st.one_of(
    GARBAGE,
    st.dictionaries(
        st.sampled_from([WAITING, RATE, ASKED, HELD]),
        st.one_of(GARBAGE, st.dictionaries(st.integers(0, 3), SERIES, max_size=3)),
    ),
)


@given(METRICS, METRICS, GARBAGE, GARBAGE, st.one_of(GARBAGE, st.dictionaries(st.sampled_from(["rate"]), GARBAGE)))
def test_whatever_is_reported_it_never_raises(
    models: Any, ingresses: Any, requests: Any, target_ongoing: Any, state: Any
) -> None:
    def context(metrics: Any, name: str) -> Any:
        return SimpleNamespace(
            deployment_name=name,
            raw_metrics=metrics,
            total_num_requests=requests,
            policy_state=state,
            target_num_replicas=3,
            config=SimpleNamespace(get_target_ongoing_requests=lambda: target_ongoing),
        )

    contexts = {"i": context(ingresses, "Ingress"), "m": context(models, "Model"), "x": object()}
    wanted, states = DrainTime()(contexts)
    assert wanted.keys() == states.keys() <= {"i", "m"}
    assert all(type(replicas) is int and 0 <= replicas <= 3 * STEP for replicas in wanted.values())


@pytest.mark.parametrize("kwargs", [{"target_drain_s": 0}, {"target_utilization": 1.1}, {"target_drain_s": math.nan}])
def test_parameters_that_mean_nothing_are_refused(kwargs: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))} is "):
        DrainTime(**kwargs)


def test_the_configuration_as_it_ships_is_one_that_serve_takes() -> None:
    [application] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())["applications"]
    policy = AutoscalingPolicy(**application["autoscaling_policy"])
    assert policy.get_policy().__name__ == "DrainTime"
    DrainTime(**policy.policy_kwargs)
    for deployment in application["deployments"]:
        scaling = AutoscalingConfig(**deployment["autoscaling_config"])
        assert scaling.look_back_period_s > 2 * scaling.metrics_interval_s, "growth is measured between two reports"
