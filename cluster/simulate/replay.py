"""One run: a load, a service and a policy; and what came out of it in numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from ray.serve.config import AutoscalingConfig

from cluster.simulate.arrivals import Arrivals
from cluster.simulate.controller import Controller, Policy, Timeline
from cluster.simulate.service import Costs, Service

# How long a run goes on after its last request, to see the replicas leave again.
TAIL_S = 120.0


@dataclass(frozen=True)
class Run:
    """A run and its figures; latencies are in seconds, in the order of the arrivals."""

    name: str
    arrivals: Arrivals
    latency_s: NDArray[np.float64]
    timeline: Timeline
    replica_s: float
    rate: float  # tokens/s of one replica

    def percentile_ms(self, share: float) -> float:
        """The latency that this share of the requests, in percent, did not exceed."""
        return float(np.percentile(self.latency_s, share) * 1e3) if len(self.latency_s) else 0.0


def replay(name: str, arrivals: Arrivals, costs: Costs, policy: Policy, scaling: AutoscalingConfig, seed: int) -> Run:
    """Run the load against a service that begins with its least replicas."""
    begin = scaling.min_replicas if scaling.initial_replicas is None else scaling.initial_replicas
    service = Service(costs, arrivals, begin, seed)
    controller = Controller(service, policy, scaling)
    service.run((float(arrivals.at_s[-1]) if len(arrivals) else 0.0) + TAIL_S)
    return Run(name, arrivals, service.latency_s, controller.timeline, service.replica_seconds(), costs.rate)


def configured(file: Path, **changes: Any) -> tuple[dict[str, float], AutoscalingConfig]:
    """The policy's parameters and the first model's `autoscaling_config` of a Serve config file, with changes."""
    [application] = yaml.safe_load(file.read_text())["applications"]
    scaling = next(each for each in application["deployments"] if each["name"].startswith("Model-"))
    given = {name: value for name, value in changes.items() if value is not None}
    return application["autoscaling_policy"]["policy_kwargs"], AutoscalingConfig(
        **scaling["autoscaling_config"] | given
    )
