"""What the users ask for, and how many there are over time."""

import doctest
import re
from itertools import islice, pairwise
from pathlib import Path
from random import Random

import pytest

from loadtest.traffic import shapes
from loadtest.traffic.kinds import KINDS, KNOWN, PASSAGES, QUERIES, Step
from loadtest.traffic.shapes import SHAPES, users_at


def steps(kind: str, number: int, seed: int = 1) -> list[Step]:
    return list(islice(KINDS[kind].script(Random(seed)), number))


@pytest.mark.parametrize("kind", KINDS)
def test_a_user_asks_for_the_same_in_every_run_and_no_two_users_ask_alike(kind: str) -> None:
    assert steps(kind, 40) == steps(kind, 40) != steps(kind, 40, seed=2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_request_can_be_answered(kind: str) -> None:
    for step in steps(kind, 200):
        assert 1 <= len(step.texts) <= 128 and all(step.texts) and 0 <= step.pause_s < 60
        assert len(set(step.texts)) == len(step.texts), "a text twice in one request can't be told from its neighbour"


def test_autocomplete_types_a_query_key_by_key() -> None:
    typed = [step.texts for step in steps("autocomplete", 60)]
    end = next(place for place, texts in enumerate(typed) if texts[0] in QUERIES)
    query = typed[end][0]
    assert typed[: end + 1] == [[query[:keys]] for keys in range(3, len(query) + 1)]
    assert len(typed[end + 1][0]) == 3, "then the next query begins"


def test_people_type_as_fast_as_people_do_and_read_between_queries() -> None:
    pauses = [(step.pause_s, step.texts[0] in QUERIES) for step in steps("autocomplete", 5000)]
    keys = [pause for pause, whole in pauses if not whole]
    assert 0.23 < sum(keys) / len(keys) < 0.25
    assert all(2 <= pause <= 6 for pause, whole in pauses if whole)


def test_the_kinds_are_told_apart_by_their_sizes() -> None:
    texts = {kind: [len(step.texts) for step in steps(kind, 400)] for kind in KINDS}
    assert set(texts["autocomplete"]) == {1}
    assert min(texts["rag"]) == 5 and max(texts["rag"]) == 9, "a question and its passages"
    assert min(texts["indexer"]) == 64 and max(texts["indexer"]) == 128
    assert min(texts["mixed"]) == 1 and max(texts["mixed"]) == 16
    # Log-uniform: as many under the geometric middle, 4, as above it.
    assert 0.4 < sum(number < 4 for number in texts["mixed"]) / 400 < 0.6


def test_all_texts_come_from_few_so_that_each_is_seen_again() -> None:
    known = {query[:keys] for query in QUERIES for keys in range(3, len(query) + 1)} | set(PASSAGES)
    assert {text for kind in KINDS for step in steps(kind, 100) for text in step.texts} <= known
    assert set(KNOWN) <= known and len(known) < 1_300


def test_the_readme_tells_of_every_kind_and_shape() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\d,]+) \|$", readme, re.MULTILINE)
    assert rows == [(name, f"{KINDS[name.lower()].p99_ms:,}") for name, _ in rows] and len(rows) == len(KINDS)
    assert all(f"`{shape}`" in readme for shape in SHAPES)


def test_the_examples_in_the_docstrings_hold() -> None:
    ran = doctest.testmod(shapes)
    assert ran.attempted > 0 and ran.failed == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_the_whole_run_and_reaches_all_users(shape: str) -> None:
    corners = SHAPES[shape]
    assert corners[0][0] == 0 and corners[-1][0] == 1
    assert all(before[0] <= after[0] for before, after in pairwise(corners))
    assert max(users_at(shape, second / 10, 60, 40) for second in range(601)) == 40


@pytest.mark.parametrize(
    ("shape", "at_s", "users"),
    [
        # Of 40 users over 100 s.
        ("steps", [0, 24, 25, 49, 50, 75, 100], [10, 10, 20, 20, 30, 40, 40]),
        ("ramp", [0, 20, 40, 80, 100], [0, 10, 20, 40, 40]),
        ("spike", [0, 24, 25, 59, 60, 100], [5, 5, 40, 40, 5, 5]),
        ("soak", [0, 50, 100], [40, 40, 40]),
        ("from-zero", [0, 19, 20, 69, 70, 100], [0, 0, 40, 40, 0, 0]),
        ("sawtooth", [0, 24.999, 25, 37.5, 49.999, 50], [5, 40, 5, 22, 40, 5]),
    ],
)
def test_users_over_time(shape: str, at_s: list[float], users: list[int]) -> None:
    assert [users_at(shape, second, 100, 40) for second in at_s] == users


def test_a_low_share_of_few_users_is_still_somebody() -> None:
    assert users_at("spike", 0, 60, 3) == 1 and users_at("from-zero", 0, 60, 3) == 0
