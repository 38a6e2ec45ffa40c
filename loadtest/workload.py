"""What is asked: the cells of the benchmark, and their request bodies, the same for every system and every run."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
SEED = 384
# Words written for one shape; a file then holds 15 (the longest lists) to 2,000 different bodies.
WORDS_A_SHAPE = 500_000
MOST_BODIES = 2_000
# Everyday words, of which about one in twelve is two tokens: with its start and end tokens a text of 64 words is about
# 1.1 tokens a word, as English prose is.
ENGLISH = """
    the of a in to and is for on with search query model vector retrieve text semantic fast answer question data
    engine cluster request latency token batch python index document user value system memory cloud network paper
    result time world people house water music light river mountain doctor school market garden window winter
    summer kitchen bridge station journey letter village history science language number colour family morning
    evening story animal forest island teacher student engineer price service quality design report meeting project
    customer delivery holiday recipe bicycle umbrella raincoat lighthouse blueberry sneakers checkout dishwasher
    headphones
"""
WORDS = ENGLISH.split()


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the benchmark: `rows` texts a request of `words` (fewest, most) words, log-uniform between."""

    name: str
    words: tuple[int, int]
    rows: int
    connections: int
    encoding: str
    seconds: float

    @property
    def shape(self) -> str:
        """What the name says before the connections; cells of one shape have the same texts."""
        return self.name.split("-")[0]


def _cells() -> tuple[Cell, ...]:
    # At 256 connections an answer takes 1.3 s for 64 words, 5 to 16 s for 510; a measurement lasts several of them, or
    # what is under way at its end would count.
    seconds = {9: (4, 4, 4, 4, 4), 64: (4, 4, 4, 8, 24), 510: (6, 6, 8, 16, 64)}
    single = [
        Cell(f"{words}w-{connections}c", (words, words), 1, connections, "base64", each)
        for words, times in seconds.items()
        for connections, each in zip((1, 8, 32, 64, 256), times, strict=True)
    ]
    lists = [
        Cell("32x64w-4c", (64, 64), 32, 4, "base64", 10),
        Cell("mixed-2c", (4, 500), 64, 2, "base64", 15),
        Cell("2048x16w-1c", (16, 16), 2048, 1, "base64", 20),
    ]
    floats = [
        Cell("9w-64c-float", (9, 9), 1, 64, "float", 4),
        Cell("32x64w-4c-float", (64, 64), 32, 4, "float", 10),
        Cell("2048x16w-1c-float", (16, 16), 2048, 1, "float", 20),
    ]
    return (*single, *lists, *floats)


CELLS = _cells()


def requests(cell: Cell) -> list[list[str]]:
    """The texts of each request of a cell."""
    # A text seed is hashed the same way in every process, unlike a tuple.
    source = random.Random(f"{SEED} {cell.shape}")
    low, high = cell.words
    typical = low if low == high else (high - low) / math.log(high / low)
    count = min(MOST_BODIES, int(WORDS_A_SHAPE / (typical * cell.rows)))

    def text() -> str:
        words = low if low == high else int(math.exp(source.uniform(math.log(low), math.log(high))))
        return " ".join(source.choices(WORDS, k=words))

    return [[text() for _ in range(cell.rows)] for _ in range(count)]


def body(texts: list[str], encoding: str) -> str:
    """A request body: one text is sent as such, several as a list."""
    sent = texts if len(texts) > 1 else texts[0]
    return json.dumps({"model": MODEL, "input": sent, "encoding_format": encoding})


def write(cell: Cell, folder: Path) -> Path:
    """Write the cell's bodies, a line each, unless they are there; the file."""
    file = folder / f"{cell.shape}-{cell.encoding}.jsonl"
    if not file.exists():
        file.write_text("".join(f"{body(texts, cell.encoding)}\n" for texts in requests(cell)))
    return file
