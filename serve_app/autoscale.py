"""How many replicas each stage needs: enough for the work that arrives, and to be done in time with what waits.

    need = (arriving + waiting / target_drain_s) / (rate * target_utilization)

Work is counted in each stage's own unit, tokens or characters. `waiting` is all that was asked of a stage and is not
done, at its replicas and at those who call it; `arriving` and `rate` are work a second, asked of the stage and done by
one replica of it that is busy. Replicas report these through Serve (`record_autoscaling_stats`). The Ingress reports
its own work in seconds of a core, and not what it has open, which may be a thousand clients who send slowly. Where
the work of a stage is not reported yet, its requests in progress over `target_ongoing_requests` are the need.

Serve's controller imports this file, so it imports nothing but the standard library; and since a policy that raises
stops the updates of every application, it never does. Around it Serve applies `upscale_delay_s`, `downscale_delay_s`
and the bounds of each deployment's `autoscaling_config`.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

logger = logging.getLogger("ray.serve")

# The names of what a replica reports of itself.
WAITING, RATE = "waiting", "rate"
# Fewer replicas are wanted only once the need is this much under what they could carry, so that noise moves nothing.
HYSTERESIS = 0.2
# One decision multiplies or divides the replicas by this much at most: a wrong measurement does no worse.
STEP = 4


def waiting_for(deployment: str) -> str:
    """The name of what a caller reports of the work that it holds for another deployment's replicas."""
    return f"waiting:{deployment}"


def asked_of(deployment: str) -> str:
    """The name of what is reported of all the work that a deployment was ever asked for, by its callers or itself."""
    return f"asked:{deployment}"


def decide(flow: float, queue: float, target: int, peak: float) -> tuple[int, float]:
    """The replicas wanted, and the peak of the flow since fewer than there are would do; 0.0 where they would not.

    `flow` is the need for what arrives, `queue` for what waits. More are wanted at once, up to STEP times as many.
    Fewer are wanted where those would do for the highest flow since they would first, so that a load which comes and
    goes finds its replicas; a queue that is gone counts no more. Serve waits until that has lasted for
    `downscale_delay_s`.

    >>> decide(4.1, 1.0, target=3, peak=0.0), decide(2.6, 0.0, target=3, peak=0.0), decide(0.5, 0.0, target=3, peak=1.5)
    ((6, 0.0), (3, 0.0), (2, 1.5))
    """
    more = math.ceil(flow + queue)
    if more > target:
        return min(more, max(target, 1) * STEP), 0.0
    if _spared(flow + queue) >= target:
        return target, 0.0
    peak = max(peak, flow)
    return max(_spared(max(peak, flow + queue)), target // STEP), peak


def _spared(need: float) -> int:
    """The replicas down to which a need may be scaled."""
    return math.ceil(need * (1 + HYSTERESIS))


class DrainTime:
    """Serve's policy for the whole application (`autoscaling_policy` of serve_config.yaml): it sees all deployments,
    and so also the work that is held for one that has no replica."""

    def __init__(self, target_drain_s: float = 5.0, target_utilization: float = 0.7) -> None:
        """`target_drain_s`: time in which what waits shall be done; `target_utilization`: share of the replicas' rate
        that is planned for. Raises ValueError for what can be no such time or share."""
        if not 0 < target_drain_s < math.inf:
            raise ValueError(f"target_drain_s is {target_drain_s}, and has to be over 0")
        if not 0 < target_utilization <= 1:
            raise ValueError(f"target_utilization is {target_utilization}, and has to be over 0 and up to 1")
        self._target_drain_s = target_drain_s
        self._target_utilization = target_utilization
        self._faults: set[str] = set()  # that were logged

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Replicas wanted of each deployment, and what to remember of it; from Serve's AutoscalingContexts.

        A deployment that can't be decided on is left out, and so stays as it is.
        """
        wanted: dict[Any, int] = {}
        states: dict[Any, dict[str, Any]] = {}
        for key, context in contexts.items():
            try:
                wanted[key], states[key] = self._decide(context, contexts.values())
            except Exception as error:
                if (fault := f"{key} {type(error).__name__}") not in self._faults:  # it is back at every turn
                    self._faults.add(fault)
                    logger.exception(f"no autoscaling decision on {key}")
        return wanted, states

    def _decide(self, context: Any, contexts: Iterable[Any]) -> tuple[int, dict[str, Any]]:
        before, target = context.policy_state, context.target_num_replicas
        flow, queue, rate = self._needs(context, contexts, before.get("rate"))
        # A peak from before the last change says nothing of the replicas that there are now.
        peak = before.get("peak", 0.0) if before.get("target") == target else 0.0
        wanted, peak = decide(flow, queue, target, peak)
        return wanted, {"target": target, "peak": peak, "rate": rate}

    def _needs(self, context: Any, contexts: Iterable[Any], known: float | None) -> tuple[float, float, float | None]:
        """Replicas needed for what arrives and for what waits, as fractions; and the rate of one, which is remembered
        for when none is there."""
        own = context.raw_metrics or {}
        rates = [rate for rate in _latest(own.get(RATE)) if rate > 0]
        rate = sum(rates) / len(rates) if rates else known
        waiting = sum(_latest(own.get(WAITING)))
        arriving: list[float] = []
        for other in contexts:
            reported = other.raw_metrics or {}
            waiting += sum(_latest(reported.get(waiting_for(context.deployment_name))))
            arriving += _growth(reported.get(asked_of(context.deployment_name)))
        if rate and arriving:
            flow = sum(arriving) / rate / self._target_utilization
            queue = waiting / rate / self._target_utilization / self._target_drain_s
        else:
            flow = context.total_num_requests / context.config.get_target_ongoing_requests()
            if known:  # the work was reported before: that it is not now is no reason for fewer
                flow = max(flow, context.target_num_replicas)
            # What waits needs a replica, also where nothing is known of how fast one is.
            queue = 0.5 if waiting and not flow else 0.0
        if not 0 <= flow + queue < math.inf:
            raise ValueError(f"a need of {flow} and {queue} replicas")
        return flow, queue, rate


def _latest(by_replica: Any) -> list[float]:
    """Each replica's last value."""
    return [value for series in (by_replica or {}).values() if series and _is_sane(value := series[-1].value)]


def _growth(by_replica: Any) -> list[float]:
    """How much each replica's count has grown a second over Serve's look-back window."""
    found = []
    for series in (by_replica or {}).values():
        if len(series) > 1 and (seconds := series[-1].timestamp - series[0].timestamp) > 0:
            growth = (series[-1].value - series[0].value) / seconds
            if _is_sane(growth):
                found.append(growth)
    return found


def _is_sane(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < math.inf
