"""Serve's controller over a simulated service: metrics as they arrive, the policy, and Serve's own delays and bounds.

The policies are the real ones, serve_app.autoscale and cluster.serves_default, and so are the delays.
"""

import math
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from ray.serve._private.common import DeploymentID
from ray.serve.autoscaling_policy import _apply_delay_logic, _apply_scaling_factors
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster.simulate.service import Service
from serve_app.autoscale import RATE, WAITING, asked_of, waiting_for

INGRESS, MODEL = DeploymentID("Ingress"), DeploymentID("Model")

Policy = Callable[[Mapping[Any, Any]], tuple[dict[Any, Any], dict[Any, dict[str, Any]]]]


class Point(NamedTuple):
    """One measurement."""

    timestamp: float
    value: float


@dataclass
class Timeline:
    """The service once a second; replicas are counted by what they are doing."""

    at_s: list[float] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    waiting_tokens: list[int] = field(default_factory=list)

    def turns(self) -> int:
        """How often the target changed its direction."""
        steps = [after - before for before, after in pairwise(self.target) if after != before]
        return sum((before < 0) != (after < 0) for before, after in pairwise(steps))


class Controller:
    """Scales a service's replicas; `config` is a deployment's `autoscaling_config`."""

    def __init__(self, service: Service, policy: Policy, config: AutoscalingConfig, loop_s: float = 0.5) -> None:
        self.timeline = Timeline()
        self.target = len(service.replicas)
        self._service = service
        self._policy = policy
        self._config = config
        self._loop_s = loop_s
        self._states: dict[Any, dict[str, Any]] = {}
        self._delays: dict[str, Any] = {}
        self._series: dict[str, dict[Hashable, deque[Point]]] = {}
        self._requests: deque[int] = deque(maxlen=self._points)
        service.at(0.0, self._measure)
        service.at(0.0, self._watch)
        service.at(loop_s, self._scale)

    @property
    def _points(self) -> int:
        return 1 + math.ceil(self._config.look_back_period_s / self._config.metrics_interval_s)

    def _measure(self, _: None) -> None:
        service = self._service
        service.at(service.now + self._config.metrics_interval_s, self._measure)
        self._requests.append(service.unanswered_requests)
        reported: dict[str, dict[Hashable, float]] = {
            WAITING: {replica.number: replica.tokens for replica in service.replicas},
            RATE: {replica.number: replica.rate.per_s for replica in service.replicas},
            waiting_for(MODEL.name): {
                number: service.held_tokens(ingress) for number, ingress in enumerate(service.ingresses)
            },
            asked_of(MODEL.name): {number: ingress.asked for number, ingress in enumerate(service.ingresses)},
        }
        for name, values in reported.items():
            known = self._series.get(name, {})
            self._series[name] = {source: known.get(source) or deque(maxlen=self._points) for source in values}
            for source, value in values.items():
                self._series[name][source].append(Point(service.now, value))

    def _context(self, deployment: DeploymentID, target: int, running: int, metrics: tuple[str, ...]) -> Any:
        requests = sum(self._requests) / len(self._requests)
        return AutoscalingContext(
            deployment_id=deployment,
            deployment_name=deployment.name,
            app_name="",
            current_num_replicas=running,
            target_num_replicas=target,
            running_replicas=[],
            total_num_requests=requests,
            total_queued_requests=0.0,
            aggregated_metrics={},
            raw_metrics={name: self._series[name] for name in metrics},  # type: ignore[misc]
            capacity_adjusted_min_replicas=self._config.min_replicas,
            capacity_adjusted_max_replicas=self._config.max_replicas,
            policy_state=self._states.get(deployment, {}),
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=self._service.now,
            config=self._config,
        )

    def _scale(self, _: None) -> None:
        service = self._service
        service.at(service.now + self._loop_s, self._scale)
        model = self._context(MODEL, self.target, len(service.replicas), (WAITING, RATE))
        ingress = self._context(
            INGRESS, len(service.ingresses), len(service.ingresses), (waiting_for(MODEL.name), asked_of(MODEL.name))
        )
        wanted, self._states = self._policy({INGRESS: ingress, MODEL: model})
        if MODEL in wanted:
            scaled = _apply_scaling_factors(wanted[MODEL], model.current_num_replicas, self._config)
            if model.current_num_replicas or not scaled:  # else Serve waits for nothing
                scaled, self._delays = _apply_delay_logic(
                    max(0, scaled), self.target, self._config, self._delays, _now=service.now
                )
            self.target = min(max(scaled, self._config.min_replicas), self._config.max_replicas)
        lacking = self.target - len(service.replicas) - len(service.starting)
        for act in [service.start] * lacking + [service.stop] * -lacking:
            act()

    def _watch(self, _: None) -> None:
        service, timeline = self._service, self.timeline
        service.at(service.now + 1.0, self._watch)
        timeline.at_s.append(service.now)
        timeline.running.append(len(service.replicas))
        timeline.target.append(self.target)
        held = sum(service.held_tokens(ingress) for ingress in service.ingresses)
        timeline.waiting_tokens.append(held + sum(replica.tokens for replica in service.replicas))
