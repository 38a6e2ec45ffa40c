"""What Serve's controller does otherwise here: the classes it gives its actors, and how it keeps its applications.

Ray's own classes are changed, so this file belongs to the one release of Ray that pyproject.toml names.
"""

from collections.abc import Callable
from typing import Any

from ray.serve._private import controller, haproxy
from ray.serve._private.application_state import ApplicationState, ApplicationStateManager
from ray.serve._private.constants import CONTROL_LOOP_INTERVAL_S
from ray.serve.schema import ApplicationStatus

from serve_app.haproxy import LastingHAProxy

# Between two turns of the control loop while an application is being deployed: Serve's own value. That takes several
# turns in a row, which at the period of RAY_SERVE_CONTROL_LOOP_INTERVAL_S were a second of the start.
DEPLOYING_PERIOD_S = 0.1


def adapt() -> None:
    """Change the controller that this runs in, as RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH has it do before all else.

    Actors get their classes from it by value, and with them the name of this HAProxy's class in place of Serve's.
    """
    haproxy.HAProxyApi = LastingHAProxy  # type: ignore[misc]
    ApplicationState._set_target_state = keep_ingress(ApplicationState._set_target_state)  # type: ignore[method-assign]
    ApplicationStateManager.update = hasten(ApplicationStateManager.update)  # type: ignore[method-assign]


def keep_ingress(set_target: Callable[..., None]) -> Callable[..., None]:
    """Have an application that is built anew keep the name of its ingress, as what is deployed still runs.

    Serve forgets it for as long as the build takes, six seconds here, and for good where the build fails: HAProxy then
    has no replica left, and all goes through Serve's proxy in Python, at a quarter of the speed.
    """

    def set_target_state(state: ApplicationState, deployment_infos: Any, **options: Any) -> None:
        name = state._ingress_deployment_name
        set_target(state, deployment_infos, **options)
        if deployment_infos is None:
            state._ingress_deployment_name = name

    return set_target_state


def hasten(update: Callable[[ApplicationStateManager], None]) -> Callable[[ApplicationStateManager], None]:
    """Have the control loop, of which this is a step, turn more often while an application is being deployed."""

    def update_states(manager: ApplicationStateManager) -> None:
        update(manager)
        is_deploying = any(info.status == ApplicationStatus.DEPLOYING for info in manager.list_app_statuses().values())
        period_s = min(DEPLOYING_PERIOD_S, CONTROL_LOOP_INTERVAL_S) if is_deploying else CONTROL_LOOP_INTERVAL_S
        controller.CONTROL_LOOP_INTERVAL_S = period_s  # type: ignore[attr-defined]

    return update_states
