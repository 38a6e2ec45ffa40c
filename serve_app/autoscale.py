"""How many replicas a stage needs: its calls in progress over the target for one replica.

Serve's controller imports this file, so it imports nothing itself; and since a policy that raises stops the updates of
every application, it never does.
"""

from typing import Any


class OngoingCalls:
    """Serve's own rule, fed with what the replicas count, as calls between them do not pass through Serve's handles."""

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Replicas wanted, before Serve applies its delays and bounds; `context` is Serve's AutoscalingContext."""
        try:
            by_replica = (context.aggregated_metrics or {}).get("ongoing_calls") or {}
            calls = max(sum(by_replica.values()), context.total_num_requests)
            return calls / context.config.get_target_ongoing_requests(), {}
        except Exception:
            return context.target_num_replicas, {}
