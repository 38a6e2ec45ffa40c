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


def split(packed: Packed, budget_tokens: int) -> list[Packed]:
    """Cut into pieces of at most `budget_tokens` (or one row), in order; views, no copies."""
    if packed.tokens <= budget_tokens:
        return [packed] if packed.rows else []
    edges = cuts(packed.lengths.tolist(), budget_tokens)
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


def bucket(rows: int, longest: int) -> tuple[int, int]:
    """The shape to pad a group to, so that an engine meets few: up to 1/4 more rows, 1/8 longer.

    >>> bucket(5, 11), bucket(33, 66), bucket(1, 512)
    ((5, 11), (40, 72), (1, 512))
    """
    return _round_up(rows, 8), _round_up(longest, 16)


def _round_up(number: int, steps: int) -> int:
    """To the next of `steps` equal steps on the way to the power of two from `number` on."""
    step = max(1, (1 << (number - 1).bit_length()) // steps)
    return -(-number // step) * step


def pad(packed: Packed, rows: NDArray[np.intp], shape: tuple[int, int]) -> tuple[Int32, Int32]:
    """Lay the named rows out for a padding engine: ids int32 [b, S], zeros behind each row; lengths int32 [b].

    `shape` holds them all; a row that is not there has length 1, so that nothing is divided by zero.
    """
    lengths = np.ones(shape[0], np.int32)
    lengths[: len(rows)] = packed.lengths[rows]
    starts = np.zeros(shape[0], np.int64)
    starts[: len(rows)] = (np.cumsum(packed.lengths) - packed.lengths)[rows]
    columns = np.arange(shape[1])
    inside = columns < lengths[:, None]  # [b, S]
    return np.where(inside, packed.ids[np.where(inside, starts[:, None] + columns, 0)], np.int32(0)), lengths


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
