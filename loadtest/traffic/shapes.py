"""How many users there are over a run, as data: corners of a line, each a share of the duration and one of the users.

Between corners the number changes evenly; two corners at one time are a jump.
"""

from itertools import pairwise

Corner = tuple[float, float]

LOW = 1 / 8  # what spikes and teeth start from: the jump is eightfold

SHAPES: dict[str, tuple[Corner, ...]] = {
    # Where does it begin to hurt?
    "steps": ((0, 0.25), (0.25, 0.25), (0.25, 0.5), (0.5, 0.5), (0.5, 0.75), (0.75, 0.75), (0.75, 1), (1, 1)),
    "ramp": ((0, 0), (0.8, 1), (1, 1)),
    # How fast is it there when work comes at once, and does it let go afterwards?
    "spike": ((0, LOW), (0.25, LOW), (0.25, 1), (0.6, 1), (0.6, LOW), (1, LOW)),
    # Does it stay as it was, for hours?
    "soak": ((0, 1), (1, 1)),
    # What does the first request after a silence wait for, and does it become small again?
    "from-zero": ((0, 0), (0.2, 0), (0.2, 1), (0.7, 1), (0.7, 0), (1, 0)),
    # Does it flap?
    "sawtooth": tuple(corner for tooth in range(4) for corner in ((tooth / 4, LOW), ((tooth + 1) / 4, 1))),
}


def users_at(shape: str, elapsed_s: float, duration_s: float, most_users: int) -> int:
    """How many users there are at a time of the run.

    >>> [users_at("spike", second, 100, 80) for second in (0, 24.9, 25, 59.9, 60, 100)]
    [10, 10, 80, 80, 10, 10]
    """
    share = min(elapsed_s / duration_s, 1.0)
    level = 0.0
    for (start, low), (end, high) in pairwise(SHAPES[shape]):
        if start <= share <= end:
            level = high if end == start else low + (high - low) * (share - start) / (end - start)
    # A share that is above 0 is somebody.
    return max(round(level * most_users), 1 if level > 0 else 0)
