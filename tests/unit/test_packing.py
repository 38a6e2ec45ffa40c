"""The pure decisions: cutting, grouping, padding, enclosing; limits at 0, 1, n and n + 1."""

from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import InvalidInput
from serve_app.packing import (
    ClientIds,
    Frame,
    Packed,
    accept_ids,
    bucket,
    concat,
    cuts,
    enclose,
    group,
    lay_out,
    reorder,
    split,
)

FRAME = Frame(start_id=101, end_id=102, vocabulary=30_522, max_tokens=8)
LENGTHS = st.lists(st.integers(1, 512), min_size=1, max_size=80)


def packed(lengths: list[int]) -> Packed:
    """Sequences whose ids are all different, so that a misplaced one shows."""
    return Packed(np.arange(sum(lengths), dtype=np.int32), np.array(lengths, np.int32))


def client_ids(*rows: list[int]) -> ClientIds:
    flat = [token for row in rows for token in row]
    return ClientIds(np.array(flat, np.int64), np.array([len(row) for row in rows], np.int32))


def rows_of(sequences: Packed) -> list[list[int]]:
    ends = np.cumsum(sequences.lengths).tolist()
    return [
        sequences.ids[end - length : end].tolist() for end, length in zip(ends, sequences.lengths.tolist(), strict=True)
    ]


@given(st.lists(st.integers(0, 100)), st.integers(1, 100))
def test_cuts_keep_every_item_once_and_runs_within_the_budget(costs: list[int], budget: int) -> None:
    edges = cuts(costs, budget)
    runs = [costs[start:stop] for start, stop in pairwise(edges)]
    assert [cost for run in runs for cost in run] == costs
    assert all(run and (sum(run) <= budget or len([c for c in run if c]) == 1) for run in runs)


@pytest.mark.parametrize(("budget", "expected"), [(1, [1] * 4), (2, [2, 2]), (3, [3, 1]), (4, [4]), (5, [4])])
def test_cuts_at_the_edges_of_the_budget(budget: int, expected: list[int]) -> None:
    assert np.diff(cuts([1, 1, 1, 1], budget)).tolist() == expected


def test_nothing_is_cut_into_nothing() -> None:
    assert cuts([], 5) == [0]
    assert split(packed([]), 5) == []
    assert group(np.array([], np.int32), 5, 1) == []


@given(LENGTHS, st.integers(1, 2000))
def test_split_then_concat_is_the_same(lengths: list[int], budget: int) -> None:
    whole = packed(lengths)
    pieces = split(whole, budget)
    assert rows_of(concat(pieces)) == rows_of(whole)
    assert all(piece.tokens <= budget or piece.rows == 1 for piece in pieces)


@given(LENGTHS, st.integers(1, 2048), st.integers(0, 128))
def test_groups_hold_every_row_once_within_the_budget(lengths: list[int], budget: int, launch: int) -> None:
    array = np.array(lengths, np.int32)
    groups = group(array, budget, launch)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    for rows in groups:
        padded = len(rows) * int(array[rows].max())
        assert padded <= budget or len(rows) == 1
        # The small batch is one launch whatever its padding; else padding stays under about one launch's cost.
        assert padded - int(array[rows].sum()) <= max(launch, min(budget, launch))


def test_equal_lengths_are_one_group() -> None:
    assert [len(rows) for rows in group(np.full(32, 64, np.int32), 1 << 20, 32)] == [32]


@given(LENGTHS, st.integers(1, 2000), st.integers(0, 20))
def test_split_makes_as_many_parts_as_asked_and_about_equal_ones(lengths: list[int], budget: int, parts: int) -> None:
    whole = packed(lengths)
    pieces = split(whole, budget, parts)
    assert rows_of(concat(pieces)) == rows_of(whole)
    assert all(piece.tokens <= budget or piece.rows == 1 for piece in pieces)
    if len(set(lengths)) == 1 and whole.tokens <= budget:
        assert len(pieces) == max(1, min(parts, len(lengths)))
        assert max(piece.rows for piece in pieces) - min(piece.rows for piece in pieces[:-1] or pieces) <= 1


def test_a_list_is_split_without_a_small_rest() -> None:
    assert [piece.rows for piece in split(packed([71] * 32), 1024)] == [11, 11, 10]


@given(LENGTHS, st.randoms())
def test_reorder_picks_rows_in_any_order(lengths: list[int], random: Random) -> None:
    whole = packed(lengths)
    order = [random.randrange(len(lengths)) for _ in range(random.randint(1, 2 * len(lengths)))]
    assert rows_of(reorder(whole, np.array(order))) == [rows_of(whole)[row] for row in order]


def test_buckets_hold_what_they_are_for_and_are_few() -> None:
    sizes = {number: bucket(number, 16, least=16) for number in range(1, 2049)}
    assert all(number <= size <= max(16 * -(-number // 16), number * 9 / 8) for number, size in sizes.items())
    assert len(set(sizes.values())) == 40
    assert [bucket(rows, 4) for rows in (1, 4, 5, 9, 16, 17)] == [1, 4, 6, 12, 16, 24]


@given(LENGTHS, st.integers(0, 40), st.integers(0, 4), st.integers(0, 9))
def test_lay_out_puts_each_token_in_its_place_in_both_forms(
    lengths: list[int], more: int, rows: int, cells: int
) -> None:
    whole = packed(lengths)
    shape = whole.tokens + more, whole.rows + rows, max(lengths) + cells
    grid = lay_out(whole, *shape)
    assert grid.ids.shape == grid.positions.shape == grid.cells.shape == shape[:1]
    assert grid.places.shape == shape[1:] and grid.lengths.shape == shape[1:2]
    assert all(array.dtype == np.int32 for array in (grid.ids, grid.positions, grid.places, grid.lengths, grid.cells))
    assert grid.lengths.tolist() == lengths + [1] * rows
    for row, ids in enumerate(rows_of(whole)):
        assert grid.ids[grid.places[row, : len(ids)]].tolist() == ids
        assert grid.positions[grid.places[row, : len(ids)]].tolist() == list(range(len(ids)))
    # Out of the rectangle and back: each token finds the cell that it was put in.
    assert grid.places.reshape(-1)[grid.cells[: whole.tokens]].tolist() == list(range(whole.tokens))
    assert not grid.ids[whole.tokens :].any() and not grid.cells[whole.tokens :].any()


@pytest.mark.parametrize(("length", "kept"), [(0, 0), (1, 1), (5, 5), (6, 6), (7, 6), (600, 6)])
def test_enclose_cuts_at_the_limit_with_room_for_both_ends(length: int, kept: int) -> None:
    tokens = list(range(1000, 1000 + length))
    sent = client_ids([7], tokens, [9])
    answer = enclose(sent.ids, sent.lengths, FRAME)
    assert rows_of(answer.packed) == [[101, 7, 102], [101, *tokens[:kept], 102], [101, 9, 102]]
    assert answer.full_lengths.tolist() == [3, length + 2, 3]
    assert answer.truncated == int(length > 6)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ([5], [101, 5, 102]),
        ([101, 5, 102], [101, 5, 102]),
        ([101, 102], [101, 102]),
        ([101], [101, 101, 102]),
        ([5, 102], [101, 5, 102, 102]),
        ([101, 5], [101, 101, 5, 102]),
        ([101, 1, 2, 3, 4, 5, 6, 102], [101, 1, 2, 3, 4, 5, 6, 102]),
        ([101, 1, 2, 3, 4, 5, 6, 7, 102], [101, 1, 2, 3, 4, 5, 6, 102]),
    ],
)
def test_client_ids_are_enclosed_unless_the_client_did(sent: list[int], expected: list[int]) -> None:
    answer = accept_ids(client_ids([30_521], sent, [0]), FRAME)
    assert rows_of(answer.packed) == [[101, 30_521, 102], expected, [101, 0, 102]]


@pytest.mark.parametrize("foreign", [-1, 30_522, 2**62, -(2**63)])
def test_ids_outside_the_vocabulary_are_named_with_their_place_and_the_cure(foreign: int) -> None:
    with pytest.raises(InvalidInput, match=rf"Token id {foreign} in input 1 .*check_embedding_ctx_length=False"):
        accept_ids(client_ids([1, 2], [3, foreign], [4]), FRAME)
