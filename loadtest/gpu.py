"""`python -m loadtest.gpu`: the torch engine alone, without Ray, over many shapes of batch, beside the device's limits.

Prints Markdown. The engine gets token ids, as in the service, where the Tokenizer deployment made them. For
sentence-transformers ids are no input: it gets the texts, and its time is that of the whole way from text to vector;
so our tokenizer and engine stand beside it over the same way.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loadtest.weights import FOUND
from loadtest.workload import MODEL, WORDS
from serve_app.engines import self_test
from serve_app.engines.bert import Bert, load
from serve_app.engines.torch import TorchEngine
from serve_app.packing import Int32
from serve_app.tokens import Tokenizer

# Before each measurement for this share of its time: caches fill, clocks rise, memory is allocated.
WARM_UP_SHARE = 0.2
# Between two queries to an idle engine, so that each finds it idle, as a lone user's does.
PAUSE_S = 0.002
# Products between two waits for the device, so that the wait itself does not count.
PRODUCTS_A_WAIT = 10


@dataclass(frozen=True, slots=True)
class Cell:
    """One batch of the grid: so many texts, each of `fewest` to `most` words."""

    texts: int
    fewest: int
    most: int

    @property
    def words(self) -> str:
        return f"{self.fewest}" if self.fewest == self.most else f"{self.fewest} to {self.most}"


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device was measured to do: operations a second in one large product, bytes a second in a large copy."""

    flops: float
    copied_bytes: float
    product_size: int
    copy_bytes: int


@dataclass(frozen=True, slots=True)
class Speed:
    """One cell, measured: tokens in its batch, the forward pass's operations, and calls a second of each way."""

    cell: Cell
    tokens: int
    flops: float
    one_caller: float
    all_lanes: float
    whole: float
    peer: float | None  # None where sentence-transformers can't be imported

    @property
    def best(self) -> float:
        return max(self.one_caller, self.all_lanes)


def cells(quick: bool) -> list[Cell]:
    """The grid; `quick` is one to try the script with, in seconds on any machine."""
    if quick:
        return [Cell(1, 9, 9), Cell(8, 9, 9), Cell(2, 64, 64), Cell(1, 510, 510), Cell(4, 4, 64), Cell(32, 16, 16)]
    equal = [(9, (1, 8, 64, 512)), (64, (1, 8, 64, 256)), (510, (1, 8, 64))]
    grid = [Cell(texts, words, words) for words, counts in equal for texts in counts]
    return [*grid, Cell(64, 4, 500), Cell(2048, 16, 16)]


def write(cell: Cell, seed: int = 0) -> list[str]:
    """The cell's texts, the same for a seed. Unlike lengths are log-uniform: as many of 4 to 8 words as of 32 to 64."""
    random, words = np.random.default_rng(seed), WORDS
    bounds = math.log(cell.fewest), math.log(cell.most + 1)
    counts = np.exp(random.uniform(*bounds, cell.texts)).astype(int).clip(cell.fewest, cell.most)
    return [" ".join(random.choice(words, count)) for count in counts]


def parameters(bert: Bert) -> int:
    """How many numbers the layers hold; embeddings are looked up, not computed."""
    dense = [part for layer in bert.layers for part in (layer.qkv, layer.out, layer.up, layer.down)]
    norms = [part for layer in bert.layers for part in (layer.out_norm, layer.down_norm)]
    return sum(d.weight.size + d.bias.size for d in dense) + sum(n.scale.size + n.shift.size for n in norms)


def attention_flops(bert: Bert) -> int:
    """Operations of attention for each token and each token that it sees: query by key, then weight by value."""
    return 4 * bert.dimensions * len(bert.layers)


def flops(bert: Bert, lengths: Int32) -> float:
    """Operations of a forward pass without padding over rows of these lengths, int32 [B].

    A token passes each parameter once, a multiplication and an addition, and sees all tokens of its row.
    """
    tokens = lengths.astype(np.float64)
    return float(2 * parameters(bert) * tokens.sum() + attention_flops(bert) * (tokens**2).sum())


def calls_a_second(call: Callable[[], Any], seconds: float, callers: int = 1) -> float:
    """How often `call` ran a second, all callers together, after a warm-up; every caller finishes at least one call.

    The time counts until the last caller is done, so a long last call makes the figure rather too small.
    """

    def repeat(until: float) -> int:
        calls = 0
        while not calls or time.perf_counter() < until:
            call()
            calls += 1
        return calls

    with ThreadPoolExecutor(callers) as pool:
        for span in (seconds * WARM_UP_SHARE, seconds):
            started = time.perf_counter()
            calls = sum(pool.map(repeat, [started + span] * callers))
            elapsed = time.perf_counter() - started
    return calls / elapsed


def latencies_ms(call: Callable[[], Any], seconds: float) -> NDArray[np.float64]:
    """How long each of the calls took, in ms, with a pause before each; at least one."""
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while not taken or time.perf_counter() < until:
        time.sleep(PAUSE_S)
        started = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - started))
    return np.array(taken)


def measure_limits(device: torch.device, dtype: torch.dtype, size: int, copy_bytes: int, seconds: float) -> Limits:
    """Multiply two matrices of `size` x `size`, and copy `copy_bytes`, on the device, over and over."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    # Random numbers: a GPU multiplies zeros with less power, and so at a higher clock.
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(PRODUCTS_A_WAIT):
            torch.mm(left, right, out=product)
        wait()

    source = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        wait()

    products = PRODUCTS_A_WAIT * calls_a_second(multiply, seconds)
    copies = calls_a_second(copy, seconds)
    return Limits(2 * size**3 * products, 2 * copy_bytes * copies, size, copy_bytes)  # a copy reads and writes


def open_peer(folder: Path, engine: TorchEngine, max_tokens: int) -> Callable[[list[str]], Any] | None:
    """sentence-transformers' `encode` on the engine's device and in its precision; None where it can't be imported."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return None
    peer = SentenceTransformer(str(folder), device="cpu" if engine.device == "cpu" else "cuda:0")
    peer.to(getattr(torch, engine.precision))
    peer.max_seq_length = max_tokens
    return lambda texts: peer.encode(texts, batch_size=len(texts), convert_to_numpy=True, show_progress_bar=False)


def measure(
    cell: Cell,
    bert: Bert,
    engine: TorchEngine,
    tokenizer: Tokenizer,
    peer: Callable[[list[str]], Any] | None,
    seconds: float,
) -> Speed:
    """Every way through one cell, one after the other, `seconds` each."""
    texts = write(cell)
    packed = tokenizer.tokenize(texts).packed
    embed = partial(engine.embed, packed)
    one_caller = calls_a_second(embed, seconds)
    return Speed(
        cell=cell,
        tokens=packed.tokens,
        flops=flops(bert, packed.lengths),
        one_caller=one_caller,
        # One lane is one caller: a second measurement would differ by noise alone.
        all_lanes=one_caller if engine.lanes == 1 else calls_a_second(embed, seconds, engine.lanes),
        whole=calls_a_second(lambda: engine.embed(tokenizer.tokenize(texts).packed), seconds),
        peer=None if peer is None else calls_a_second(partial(peer, texts), seconds),
    )


@contextmanager
def one_core() -> Iterator[None]:
    """Keep the `tokenizers` library to one thread; it reads this variable at each call."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def line(*fields: str) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(fields)} |"


def head(lanes: int) -> str:
    """The first two lines of the grid's table; all rates are tokens/s."""
    callers = "1 caller" if lanes == 1 else f"{lanes} callers"
    ways = ("engine, 1 caller", f"engine, all lanes ({callers})", "tokenizer and engine", "sentence-transformers")
    return line("texts", "words each", "tokens", *ways, "TFLOP/s", "of the product's") + "\n" + "|---" * 9 + "|"


def show(speed: Speed, limits: Limits) -> str:
    """One line of the grid's table; the last two fields are of the engine's better rate."""
    rates = [speed.tokens * calls for calls in (speed.one_caller, speed.all_lanes, speed.whole)]
    reached = speed.flops * speed.best
    return line(
        f"{speed.cell.texts:,}",
        speed.cell.words,
        f"{speed.tokens:,}",
        *(f"{rate:,.0f}" for rate in rates),
        "can't be imported" if speed.peer is None else f"{speed.tokens * speed.peer:,.0f}",
        f"{reached / 1e12:.4g}",
        f"{reached / limits.flops:.2%}",
    )


def cores_to_feed(engine_tokens_s: float, tokenizer_tokens_s: float) -> int:
    """How many tokenizer cores keep the engine busy.

    >>> cores_to_feed(1_000_000, 300_000), cores_to_feed(10_000, 300_000)
    (4, 1)
    """
    return math.ceil(engine_tokens_s / tokenizer_tokens_s)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.gpu", description="Measure the torch engine alone.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement, after its warm-up")
    parser.add_argument("--quick", action="store_true", help="a small grid, to try the script with")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print as it goes; returns the exit status."""
    options = parse(arguments)
    if options.device == "cpu":
        # The engine takes a GPU where it sees one; CUDA reads this when it is first asked.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        print("gpu: this machine has no CUDA device; `--device cpu` measures its CPU", file=sys.stderr)
        return 1
    given = sys.argv[1:] if arguments is None else arguments
    report(options, " ".join(["python -m loadtest.gpu", *given]))
    return 0


def report(options: argparse.Namespace, command: str) -> None:
    """Print the whole of it, each line as soon as it is known: what breaks off late has not lost what came before."""
    say = partial(print, flush=True)
    seconds, cores = options.seconds, os.cpu_count() or 1
    bert = load(FOUND.folder, "mean", normalize=True)
    engine = TorchEngine(bert, "auto", cores)
    cosine = self_test(engine, bert)  # speed counts only where the vectors are right
    max_tokens = len(bert.positions)
    tokenizer = Tokenizer(FOUND.folder, max_tokens, lowercase=False)
    peer = open_peer(FOUND.folder, engine, max_tokens)

    on_gpu = options.device == "cuda"
    size, copy_bytes = (8192, 1 << 30) if on_gpu else (2048, 1 << 28)
    if options.quick:
        size, copy_bytes = 512, 1 << 24
    place = torch.device("cuda:0" if on_gpu else "cpu")
    limits = measure_limits(place, getattr(torch, engine.precision), size, copy_bytes, seconds)

    say(f"`{command}`\n")
    cuda = f" with CUDA {torch.version.cuda}" if on_gpu else ""
    say(f"Device {engine.device.removeprefix('cuda:')}, {cores} CPU cores; torch {torch.__version__}{cuda}.")
    say(f"{MODEL} in {engine.precision}; lowest cosine to the float32 reference {cosine:.6f}.")
    say(f"Each figure is the mean over {seconds:g} s.\n")
    say("Tokens/s. The engine's columns are from token ids to vectors. sentence-transformers can't be given ids: its")
    say("column is from texts to vectors, all texts as one batch, in the same precision, and beside it is the same way")
    say(f"through our tokenizer and engine, with one caller. Texts are cut at {max_tokens} tokens everywhere.")
    if engine.lanes == 1:
        say("This engine has one lane, so one caller and all lanes are one measurement.")
    say(f"\n{head(engine.lanes)}")
    speeds = []
    for cell in cells(options.quick):
        speeds.append(measure(cell, bert, engine, tokenizer, peer, seconds))
        say(show(speeds[-1], limits))

    query = tokenizer.tokenize(write(Cell(1, 9, 9))).packed
    latencies = latencies_ms(partial(engine.embed, query), seconds)
    p50, p99 = np.percentile(latencies, (50, 99))
    best = max(speeds, key=lambda speed: speed.tokens * speed.best)
    fed = best.tokens * best.best
    texts = write(best.cell)
    with one_core():
        made = best.tokens * calls_a_second(lambda: tokenizer.tokenize(texts), seconds)
    shape = f"{best.cell.texts:,} texts of {best.cell.words} words"
    say("\n| measured | |\n|---|---|")
    say(line(f"product of two {size:,} x {size:,} matrices, {engine.precision}", f"{limits.flops / 1e12:.4g} TFLOP/s"))
    say(line(f"copy of {copy_bytes >> 20:,} MiB, read and written", f"{limits.copied_bytes / 1e9:,.4g} GB/s"))
    computed = f"{2 * parameters(bert):,} + {attention_flops(bert):,} x the text's tokens"
    say(line("operations a token (2 a parameter outside the embeddings, and attention)", computed))
    say(line(f"one 9-word query of {query.tokens} tokens, idle engine, p50", f"{p50:.3g} ms"))
    say(line(f"the same, p99 of {len(latencies):,}", f"{p99:.3g} ms"))
    say(line(f"engine at its best: {shape}", f"{fed:,.0f} tokens/s"))
    say(line("our tokenizer on one core, the same texts", f"{made:,.0f} tokens/s"))
    say(line("tokenizer cores that feed the engine at its best", f"{cores_to_feed(fed, made):,}"))


if __name__ == "__main__":
    sys.exit(main())
