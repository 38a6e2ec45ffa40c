"""What an answer has to be, on vectors of three values that one can check by hand."""

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from loadtest.traffic.checks import Answer, Fault, Vector, check, parse

TEXTS = ["red shoes", "blue shoes", "tax return"]
ROWS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.6, 0.0, 0.8))


def vectors(rows: Sequence[Sequence[float]]) -> list[Vector]:
    return [np.array(row, np.float32) for row in rows]


KNOWN = dict(zip(TEXTS, vectors(ROWS), strict=True))


def fault(rows: Sequence[Sequence[float]], indexes: Sequence[int] = (0, 1, 2)) -> str | None:
    found = check(Answer(list(indexes), vectors(rows), 9), TEXTS, 3, KNOWN)
    return None if found is None else str(found)


def test_a_right_answer_has_no_fault() -> None:
    assert fault(ROWS) is None


def test_a_text_that_was_never_seen_is_held_to_all_but_its_vector() -> None:
    answer = Answer([0], vectors([(0.0, 0.0, 1.0)]), 3)
    assert check(answer, ["unseen"], 3, KNOWN) is None
    assert str(check(answer, ["red shoes"], 3, KNOWN)) == "vector: not the one that its text had before (cosine 0.00)"


@pytest.mark.parametrize(
    ("rows", "indexes", "reason"),
    [
        (ROWS[:2], (0, 1), "count: 2 vectors for 3 texts"),
        ((*ROWS, ROWS[0]), (0, 1, 2, 3), "count: 4 vectors for 3 texts"),
        (ROWS, (0, 2, 1), "order: the indexes do not count up from 0"),
        (ROWS, (1, 2, 3), "order: the indexes do not count up from 0"),
        ((ROWS[0], ROWS[1], (0.6, 0.8)), (0, 1, 2), "dimension: a vector of 2 values instead of 3"),
        ((ROWS[0], ROWS[1], (1.2, 0.0, 1.6)), (0, 1, 2), "norm: a vector of length 2 instead of 1"),
        ((ROWS[0], (0.0, 0.0, 0.0), ROWS[2]), (0, 1, 2), "norm: a vector of length 0 instead of 1"),
        ((ROWS[0], (np.nan, 1.0, 0.0), ROWS[2]), (0, 1, 2), "norm: a vector of length nan instead of 1"),
        # Each of length 1, each somebody's: only the texts' own vectors tell.
        ((ROWS[2], ROWS[1], ROWS[0]), (0, 1, 2), "vector: not the one that its text had before (cosine 0.60)"),
    ],
)
def test_the_first_thing_wrong_is_named(rows: Sequence[Sequence[float]], indexes: Sequence[int], reason: str) -> None:
    assert fault(rows, indexes) == reason


@pytest.mark.parametrize(("cosine", "right"), [(0.9991, True), (0.9989, False)])
def test_a_vector_may_differ_by_a_batchs_rounding_and_no_more(cosine: float, right: bool) -> None:
    tilted = (cosine, (1 - cosine**2) ** 0.5, 0.0)
    assert (fault((tilted, ROWS[1], ROWS[2])) is None) == right


@pytest.mark.parametrize(("length", "right"), [(1.00005, True), (1.0002, False), (0.9998, False)])
def test_a_length_may_differ_by_a_float32s_rounding_and_no_more(length: float, right: bool) -> None:
    assert (fault(((length, 0.0, 0.0), ROWS[1], ROWS[2])) is None) == right


def body(**changes: Any) -> bytes:
    packed = base64.b64encode(np.array(ROWS[2], "<f4").tobytes()).decode()
    answer = {"data": [{"index": 0, "embedding": packed}], "usage": {"prompt_tokens": 7}}
    return json.dumps(answer | changes).encode()


def test_both_encodings_are_read() -> None:
    packed = parse(body())
    numbers = parse(body(data=[{"index": 0, "embedding": [0.6, 0, 0.8]}]))
    assert packed.tokens == 7 and packed.indexes == numbers.indexes == [0]
    assert packed.vectors[0].dtype == numbers.vectors[0].dtype == np.float32
    np.testing.assert_array_equal(packed.vectors[0], numbers.vectors[0])


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>secret</html>",
        b"[]",
        body(data=None),
        body(data=[{"index": 0}]),
        body(data=[{"index": 0, "embedding": "secret!"}]),
        body(data=[{"index": 0, "embedding": "AAAA"}]),  # three bytes are no float32
        body(data=[{"index": 0, "embedding": ["secret"]}]),
        body(usage={}),
    ],
)
def test_what_is_no_answer_is_a_fault_that_quotes_nothing(answer: bytes) -> None:
    with pytest.raises(Fault) as caught:
        parse(answer)
    assert caught.value.what == "body" and "secret" not in str(caught.value)


def test_no_reason_holds_a_text() -> None:
    said = [fault(ROWS[:2], (0, 1)), fault(ROWS, (2, 1, 0)), fault((ROWS[1], ROWS[0], ROWS[2]))]
    assert all(said) and not any(word in reason for reason in said if reason for text in TEXTS for word in text.split())
