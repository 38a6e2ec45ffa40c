"""Serve's default policy for this graph, to be compared with: it wants replicas by the requests in progress."""

from collections.abc import Mapping
from copy import copy
from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy


def serves_default(contexts: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[Any, dict[str, Any]]]:
    """Replicas wanted of each deployment: its requests in progress over `target_ongoing_requests`.

    Calls of a model don't come through Serve's handles, so Serve itself would see none. Each request is a call of the
    model, though, so those in progress at the ingress are the model's.
    """
    ongoing = sum(each.total_num_requests for each in contexts.values() if each.deployment_name == "Ingress")
    wanted = {}
    for key, context in contexts.items():
        if context.deployment_name.startswith("Model"):
            context = copy(context)
            context.total_num_requests = ongoing
        wanted[key], _ = replica_queue_length_autoscaling_policy(context)
    return wanted, {}
