"""A replica's rate by hand-worked times."""

import time

import pytest

from serve_app.rate import NEWEST_SHARE, Pace, Rate


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


def test_one_that_was_tried_out_knows_its_rate_and_not_that_of_its_first_run() -> None:
    pauses = [0.5, 0.0]
    rate = Rate(full=10)
    rate.try_out(10, lambda: time.sleep(pauses.pop(0)))
    assert not pauses and rate.per_s > 40  # the first run, at most 20 a second, has no part in it


def test_a_queue_is_judged_by_what_was_seen_of_it_and_only_while_that_is_fresh() -> None:
    pace = Pace()
    assert pace.wait_s(1000, now=0.0) == 0.0, "nothing is known"
    pace.told = 100.0
    assert pace.wait_s(1000, now=0.0) == 10.0
    pace.record(1, seconds=0.01, now=1.0)  # too little to be believed
    assert pace.wait_s(1000, now=1.0) == 10.0
    for second in range(2, 40):
        pace.record(50, seconds=1.0, now=float(second))
    assert pace.wait_s(1000, now=40.0) == pytest.approx(20.0, rel=0.01)
    assert pace.wait_s(1000, now=50.0) == 10.0


def test_a_pace_that_changes_is_followed() -> None:
    pace = Pace()
    for second in range(10):
        pace.record(50, seconds=1.0, now=float(second))
    for second in range(10, 20):
        pace.record(500, seconds=1.0, now=float(second))
    assert 1.9 < pace.wait_s(1000, now=20.0) < 2.6
