"""Token sequences laid end to end, and the pure decisions about them: what to take, how to cut, how to group.

Nothing here waits, locks or touches a device, so every rule can be tested with plain numbers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import InvalidInput

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Packed:
    """Valid sequences end to end: ids int32 [T], lengths int32 [B], every length >= 1, their sum T.

    Two flat arrays cross a process boundary over ten times cheaper than lists of Python integers do.
    """

    ids: Int32
    lengths: Int32

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def rows(self) -> int:
        return len(self.lengths)


def typical(tokens: int) -> Packed:
    """Sequences of a usual length, together at most so many tokens, for an engine to try itself out with."""
    length = 32
    return Packed(np.ones(tokens // length * length, np.int32), np.full(tokens // length, length, np.int32))


def concat(parts: Sequence[Packed]) -> Packed:
    """Join packed sequences, in order."""
    if len(parts) == 1:
        return parts[0]
    return Packed(np.concatenate([p.ids for p in parts]), np.concatenate([p.lengths for p in parts]))


def cuts(costs: Iterable[int], budget: int) -> list[int]:
    """Cut a row of costs into runs of at most `budget`; an item over the budget stands alone.

    >>> cuts([3, 3, 3, 9, 1], budget=6)  # [3 3] [3] [9] [1]
    [0, 2, 3, 4, 5]
    """
    edges, spent, index = [0], 0, 0
    for index, cost in enumerate(costs, start=1):
        if spent and spent + cost > budget:
            edges.append(index - 1)
            spent = 0
        spent += cost
    if index:
        edges.append(index)
    return edges


def split(packed: Packed, budget_tokens: int, parts: int = 1) -> list[Packed]:
    """Cut into pieces of at most `budget_tokens` (or one row), in order; views, no copies.

    As few as that allows, but `parts` if there are as many rows, and about equal.
    """
    parts = max(1, min(packed.rows, max(parts, -(-packed.tokens // budget_tokens))))
    if parts == 1:
        return [packed] if packed.rows else []
    # Half a row more than an equal part, or what the cuts round off would be a piece of its own.
    equal_tokens = packed.tokens / parts + packed.tokens / packed.rows / 2
    edges = cuts(packed.lengths.tolist(), min(budget_tokens, int(equal_tokens)))
    offsets = np.concatenate(([0], np.cumsum(packed.lengths)))
    return [
        Packed(packed.ids[offsets[start] : offsets[stop]], packed.lengths[start:stop])
        for start, stop in pairwise(edges)
    ]


def group(lengths: Int32, budget_tokens: int, launch_tokens: int) -> list[NDArray[np.intp]]:
    """Group rows of like length for an engine that pads: row numbers, longest group first.

    A group holds at most `budget_tokens` with its padding (or one row), and is closed once its padding costs more
    than one more launch would (`launch_tokens`: the fixed cost of a launch, in tokens' worth of time). So equal
    lengths never split for nothing, and mixed lengths waste at most about one launch a group.
    """
    order = np.argsort(-lengths, kind="stable")
    if not len(order) or len(order) * int(lengths[order[0]]) <= min(budget_tokens, launch_tokens):
        return [order] if len(order) else []
    groups, start, padding, longest = [], 0, 0, 0
    for index, length in enumerate(lengths[order].tolist()):
        rows = index - start
        if rows and ((rows + 1) * longest > budget_tokens or padding + longest - length > launch_tokens):
            groups.append(order[start:index])
            start, rows = index, 0
        if not rows:
            longest, padding = length, 0
        padding += longest - length
    groups.append(order[start:])
    return groups


def bucket(number: int, steps: int, least: int = 1) -> int:
    """The size to pad to, so that an engine meets few: the next of `steps` equal steps to the power of two above, or of
    steps of `least` where those are larger.

    >>> bucket(5, 8), bucket(33, 8), bucket(66, 16), bucket(512, 16), bucket(11, 16, least=16)
    (5, 40, 72, 512, 16)
    """
    step = max(least, (1 << (number - 1).bit_length()) // steps)
    return -(-number // step) * step


def positions(packed: Packed) -> Int32:
    """The place of each token in its own sequence, int32 [T].

    >>> positions(Packed(np.zeros(5, np.int32), np.array([2, 3], np.int32)))
    array([0, 1, 0, 1, 2], dtype=int32)
    """
    starts = np.cumsum(packed.lengths, dtype=np.int32) - packed.lengths
    return np.arange(packed.tokens, dtype=np.int32) - np.repeat(starts, packed.lengths)


def reorder(packed: Packed, order: NDArray[np.intp]) -> Packed:
    """The same sequences in another order, or some of them."""
    lengths = packed.lengths[order]
    starts = (np.cumsum(packed.lengths) - packed.lengths)[order]
    shift = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return Packed(packed.ids[np.arange(len(shift)) + shift], lengths)


@dataclass(frozen=True, slots=True)
class Grid:
    """The same tokens end to end and as a rectangle of one sequence a row, for an engine that computes with both.

    ids and positions int32 [T]; places int32 [b, S]: which token stands in each cell, any one where none does;
    lengths int32 [b]; cells int32 [T]: in which cell, counted row by row, each token stands.
    """

    ids: Int32
    positions: Int32
    places: Int32
    lengths: Int32
    cells: Int32


def lay_out(packed: Packed, tokens: int, rows: int, longest: int) -> Grid:
    """Lay sequences out with `tokens`, `rows` and `longest` at least what they have themselves.

    A token too many is a copy of nothing's id 0 in the first cell; a row too many has length 1, so that nothing is
    divided by zero.
    """
    place = positions(packed)
    lengths = np.ones(rows, np.int32)
    lengths[: packed.rows] = packed.lengths
    starts = np.zeros(rows, np.int32)
    starts[1 : packed.rows] = np.cumsum(packed.lengths[:-1])
    columns = np.arange(longest, dtype=np.int32)
    places = np.where(columns < lengths[:, None], starts[:, None] + columns, 0)
    cells = np.repeat(np.arange(packed.rows, dtype=np.int32) * longest, packed.lengths) + place

    def padded(numbers: Int32) -> Int32:  # a quarter of what np.pad takes
        whole = np.zeros(tokens, np.int32)
        whole[: len(numbers)] = numbers
        return whole

    return Grid(padded(packed.ids), padded(place), places, lengths, padded(cells))


@dataclass(frozen=True, slots=True)
class ClientIds:
    """Token ids as a client sent them, end to end, not yet held against a vocabulary: int64 [T], int32 [B]."""

    ids: NDArray[np.int64]
    lengths: Int32


@dataclass(frozen=True, slots=True)
class Frame:
    """What a tokenizer puts around a text's tokens, and how many tokens a model takes: what ids are held against."""

    start_id: int
    end_id: int
    vocabulary: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Sequences within the model's limit, and how long each was before it was cut.

    full_lengths int32 [B]: at least this many tokens; exact where it is not over the limit.
    """

    packed: Packed
    full_lengths: Int32

    @property
    def truncated(self) -> int:
        """How many sequences were cut."""
        return int(np.count_nonzero(self.full_lengths > self.packed.lengths))


def enclose(ids: NDArray[np.integer], lengths: Int32, frame: Frame) -> Tokenized:
    """Cut each row to the limit and put the start and end tokens around it.

    >>> enclose(np.array([7, 8, 9]), np.array([1, 2], np.int32), Frame(101, 102, 30522, 512)).packed.ids
    array([101,   7, 102, 101,   8,   9, 102], dtype=int32)
    """
    kept = np.minimum(lengths, frame.max_tokens - 2).astype(np.int32)
    framed = kept + 2
    ends = np.cumsum(framed)
    packed = np.empty(int(ends[-1]) if len(ends) else 0, np.int32)
    inner = np.ones(len(packed), bool)
    inner[ends - 1] = inner[ends - framed] = False
    packed[ends - 1] = frame.end_id
    packed[ends - framed] = frame.start_id
    starts = np.cumsum(lengths) - lengths
    column = np.arange(len(ids)) - np.repeat(starts, lengths)
    packed[inner] = ids[column < np.repeat(kept, lengths)]
    return Tokenized(Packed(packed, framed), (lengths + 2).astype(np.int32))


def accept_ids(sent: ClientIds, frame: Frame) -> Tokenized:
    """Hold a client's ids against the vocabulary and enclose them, unless the client did; raises InvalidInput.

    Ids are never decoded: what the client sent is what is embedded.
    """
    foreign = (sent.ids < 0) | (sent.ids >= frame.vocabulary)
    if foreign.any():
        place = int(np.argmax(foreign))
        row = int(np.searchsorted(np.cumsum(sent.lengths), place, side="right"))
        raise InvalidInput(
            f"Token id {int(sent.ids[place])} in input {row} is not in this model's vocabulary of {frame.vocabulary} "
            "tokens. Ids of another tokenizer give meaningless vectors: send text instead. LangChain sends text with "
            "OpenAIEmbeddings(check_embedding_ctx_length=False).",
            "input",
        )
    ends = np.cumsum(sent.lengths)
    starts = ends - sent.lengths
    enclosed = (sent.lengths >= 2) & (sent.ids[starts] == frame.start_id) & (sent.ids[ends - 1] == frame.end_id)
    inner = np.ones(len(sent.ids), bool)
    inner[starts[enclosed]] = inner[ends[enclosed] - 1] = False
    return enclose(sent.ids[inner], sent.lengths - 2 * enclosed.astype(np.int32), frame)


def join(parts: Sequence[Tokenized]) -> Tokenized:
    """Join tokenized sequences, in order."""
    if len(parts) == 1:
        return parts[0]
    return Tokenized(concat([p.packed for p in parts]), np.concatenate([p.full_lengths for p in parts]))
