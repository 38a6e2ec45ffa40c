"""The policy inside Serve's own wrapper of delays and bounds, without a cluster."""

from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.autoscale import OngoingCalls


def context(calls: dict[str, float] | None, requests: float = 0, replicas: int = 2) -> Any:
    return SimpleNamespace(
        aggregated_metrics=None if calls is None else {"ongoing_calls": calls},
        total_num_requests=requests,
        target_num_replicas=replicas,
        config=SimpleNamespace(get_target_ongoing_requests=lambda: 4),
    )


@pytest.mark.parametrize(
    ("calls", "requests", "wanted"),
    [({"a": 12, "b": 8}, 1, 5), ({"a": 0}, 0, 0), ({}, 8, 2), (None, 8, 2), ({"a": 2}, 6, 1.5)],
)
def test_replicas_follow_the_calls_in_progress(calls: dict[str, float] | None, requests: float, wanted: float) -> None:
    assert OngoingCalls()(context(calls, requests)) == (wanted, {})


def test_it_keeps_what_there_is_rather_than_raise() -> None:
    broken = context({"a": 1}, replicas=3)
    del broken.config
    assert OngoingCalls()(broken) == (3, {})
