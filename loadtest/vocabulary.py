"""`python -m loadtest.vocabulary`: what it costs that people use more words than the benchmark's texts have."""

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from loadtest import wrk
from loadtest.systems import System, systems
from loadtest.weights import FOUND, TOKENIZER
from loadtest.workload import CELLS, SEED, WORDS, Cell, body

MEASURED = ("9w-64c", "64w-64c")
TURNS = 5  # of all vocabularies: what drifts on the machine meets each
SECONDS = 8.0
# More than are asked for within that time, since wrk begins anew with the first.
WORDS_A_TURN = 150_000

Draw = Callable[[int], list[str]]


def vocabularies(source: random.Random) -> dict[str, Draw]:
    """Name -> what draws so many words."""
    by_id: dict[str, int] = json.loads((FOUND.folder / "tokenizer.json").read_text())["model"]["vocab"]
    # BERT's vocabulary has its words, after single letters, in the order of how often English has them, which is all
    # that Zipf's law needs.
    words = [
        word for word in sorted(by_id, key=by_id.__getitem__) if word.isascii() and word.isalpha() and len(word) > 1
    ]
    shares = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))

    def english(count: int) -> list[str]:
        return source.choices(words, cum_weights=shares, k=count)

    def new(count: int) -> list[str]:
        drawn = source.choices(words, k=2 * count)
        return [first + second for first, second in zip(drawn[::2], drawn[1::2], strict=True)]

    return {
        f"the benchmark's {len(WORDS)}": lambda count: source.choices(WORDS, k=count),
        f"{len(words):,}, each as often as in English": english,
        "each word for the first time": new,
    }


def ask(system: System, cell: Cell, draw: Draw, folder: Path) -> tuple[wrk.Load, float]:
    """What wrk saw of texts of words that were just drawn, and the tokens of one."""
    length = cell.words[0]
    words = draw(WORDS_A_TURN // length * length)
    texts = [" ".join(words[at : at + length]) for at in range(0, len(words), length)]
    file = folder / "bodies.jsonl"
    file.write_text("".join(f"{body([text], cell.encoding)}\n" for text in texts))
    load = wrk.run(system.url, file, cell.connections, SECONDS)
    assert load.refused + load.broken == 0, f"{load.refused} refused, {load.broken} broken"
    return load, TOKENIZER.tokenize(texts).packed.tokens / len(texts)


def main() -> None:
    """Run and print a Markdown table."""
    argparse.ArgumentParser(prog="python -m loadtest.vocabulary").parse_args()
    wrk.require()
    kinds = vocabularies(random.Random(SEED))
    print(f"`python -m loadtest.vocabulary`, 64 connections, medians of {TURNS} turns\n")
    print("| words | words a text | tokens a text | requests/s | tokens/s | p99 ms |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="vocabulary-") as scratch:
        folder = Path(scratch)
        system = systems(folder)["ours"]
        with system.running(folder):
            for cell in (cell for cell in CELLS if cell.name in MEASURED):
                turns = [
                    {name: ask(system, cell, draw, folder) for name, draw in kinds.items()} for _ in range(1 + TURNS)
                ]
                for name in kinds:
                    loads = [turn[name][0] for turn in turns[1:]]  # the first warmed up
                    made = statistics.median(turn[name][1] for turn in turns)
                    rate = statistics.median(load.answers / load.seconds for load in loads)
                    p99_ms = statistics.median(load.p99_ms for load in loads)
                    print(f"| {name} | {cell.words[0]} | {made:.1f} | {rate:.0f} | {rate * made:,.0f} | {p99_ms:.0f} |")


if __name__ == "__main__":
    main()
