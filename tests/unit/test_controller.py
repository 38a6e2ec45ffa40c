"""What Serve's controller does otherwise: the classes it gives its actors, and how it keeps its applications."""

import asyncio
from typing import Any

import pytest
from ray import cloudpickle
from ray.serve._private import controller, haproxy
from ray.serve._private.application_state import ApplicationState, ApplicationStateManager
from ray.serve._private.constants import CONTROL_LOOP_INTERVAL_S
from ray.serve.schema import ApplicationStatus

from serve_app.controller import DEPLOYING_PERIOD_S, adapt, hasten

# What Serve's controller makes its actors of, and what it gives them of ours.
ACTOR, GIVEN = haproxy.HAProxyManager.__ray_metadata__.modified_class, b"LastingHAProxy"
# Of serve_config.yaml, which these tests run without.
CALM_PERIOD_S = 0.5


@pytest.fixture
def adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Serve's controller; what it changes there is put back."""
    monkeypatch.setattr(haproxy, "HAProxyApi", haproxy.HAProxyApi)
    monkeypatch.setattr(ApplicationState, "_set_target_state", ApplicationState._set_target_state)
    monkeypatch.setattr(ApplicationStateManager, "update", ApplicationStateManager.update)
    assert GIVEN not in cloudpickle.dumps(ACTOR)
    adapt()


def test_serves_actors_are_given_our_haproxy(adapted: None) -> None:
    assert GIVEN in cloudpickle.dumps(ACTOR)


def test_the_ingress_is_not_forgotten_while_an_update_is_built(adapted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ApplicationState, "_update_status", lambda *_: None)
    application = ApplicationState.__new__(ApplicationState)
    application._ingress_deployment_name = "Ingress"
    application._ingress_request_router_deployment_name = None
    application._clear_target_state_and_store_config(None)
    assert application.ingress_deployment == "Ingress"
    application._set_target_state_deleting()
    assert application.ingress_deployment is None


class Manager(ApplicationStateManager):
    """Of applications whose states are those given once they were updated."""

    def __init__(self, *statuses: ApplicationStatus) -> None:
        self._statuses = statuses
        self._application_states = {}

    def update(self) -> None:
        for number, status in enumerate(self._statuses):
            state = self._application_states[str(number)] = ApplicationState.__new__(ApplicationState)
            state._status, state._status_msg, state._deployment_timestamp = status, "", 0.0


@pytest.mark.parametrize(
    ("statuses", "period_s"),
    [
        ((), CALM_PERIOD_S),
        ((ApplicationStatus.RUNNING,), CALM_PERIOD_S),
        ((ApplicationStatus.RUNNING, ApplicationStatus.DEPLOYING), DEPLOYING_PERIOD_S),
        ((ApplicationStatus.DEPLOY_FAILED,), CALM_PERIOD_S),  # nothing is going to change
        ((ApplicationStatus.UNHEALTHY,), CALM_PERIOD_S),
    ],
)
async def test_the_control_loop_turns_more_often_while_an_application_is_being_deployed(
    monkeypatch: pytest.MonkeyPatch, statuses: tuple[ApplicationStatus, ...], period_s: float
) -> None:
    """Serve's own loop, around a step that does nothing else."""
    monkeypatch.setattr("serve_app.controller.CONTROL_LOOP_INTERVAL_S", CALM_PERIOD_S)
    monkeypatch.setattr(controller, "CONTROL_LOOP_INTERVAL_S", -1.0)
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", sleep)
    loop = Idle(lambda: hasten(Manager.update)(Manager(*statuses)))
    with pytest.raises(asyncio.CancelledError):
        await controller.ServeController.run_control_loop(loop)  # type: ignore[arg-type]
    assert slept == [period_s]


def test_serves_own_step_sets_the_period(adapted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "CONTROL_LOOP_INTERVAL_S", -1.0)
    ApplicationStateManager.update(Manager())
    assert controller.CONTROL_LOOP_INTERVAL_S == CONTROL_LOOP_INTERVAL_S


class Idle:
    """A controller whose step is given; whatever else is asked of it does nothing."""

    def __init__(self, step: Any) -> None:
        self._step = step

    async def run_control_loop_step(self, *_: Any) -> None:
        self._step()

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *_: Any) -> None:
        return None


def test_a_shorter_period_that_is_configured_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.controller.CONTROL_LOOP_INTERVAL_S", 0.02)
    monkeypatch.setattr(controller, "CONTROL_LOOP_INTERVAL_S", -1.0)
    hasten(Manager.update)(Manager(ApplicationStatus.DEPLOYING))
    assert controller.CONTROL_LOOP_INTERVAL_S == 0.02
