"""A replica's rate by hand-worked times."""

import pytest

from serve_app.rate import NEWEST_SHARE, Rate


def test_small_batches_say_nothing_of_a_rate() -> None:
    rate = Rate(full=100)
    rate.record(49, 0.0, 1.0)
    assert rate.per_s == 0.0
    rate.record(50, 1.0, 2.0)
    assert rate.per_s == 50.0
    rate.record(1, 2.0, 3.0)
    assert rate.per_s == 50.0


def test_a_rate_moves_towards_the_newest_batches() -> None:
    rate = Rate(full=100)
    rate.record(100, 0.0, 1.0)
    rate.record(100, 1.0, 3.0)
    assert rate.per_s == pytest.approx(100 / (1 + NEWEST_SHARE))
    for start in range(3, 103, 2):
        rate.record(100, start, start + 2)
    assert rate.per_s == pytest.approx(50, rel=0.01)


def test_batches_that_overlap_share_the_time() -> None:
    """Two lanes that each take two seconds for a batch do one a second together."""
    rate = Rate(full=100)
    for start in range(100):
        rate.record(100, start, start + 2)
    assert rate.per_s == pytest.approx(100, rel=0.01)


def test_one_that_was_tried_out_knows_its_rate() -> None:
    ran = []
    rate = Rate(full=10)
    rate.try_out(10, lambda: ran.append(1))
    assert ran == [1] and rate.per_s > 1000
