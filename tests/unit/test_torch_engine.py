"""The torch engine against the definition and against sentence-transformers, its packing, its shapes, its limits."""

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from serve_app.engines import bert, open_engine
from serve_app.engines import torch as torch_engine
from serve_app.engines.bert import Bert, reference
from serve_app.engines.torch import GRAPHS, Encoder, TorchEngine, fit, flash_attention, lay_out, reorder, settle
from serve_app.errors import EngineError
from serve_app.packing import Float32, Packed, concat
from tests.model import FOLDER

BARS = {"float32": 0.99999, "bfloat16": 0.9995}
SHAPES = [(1,), (9,), (512,), (11,) * 32, (3, 200, 1, 64, 5, 511, 9, 33, 2, 2)]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


@cache
def network(pooling: bert.Pooling = "mean", normalize: bool = True) -> Bert:
    return bert.load(FOLDER, pooling, normalize)


@cache
def engine(precision: str) -> TorchEngine:
    return TorchEngine(network(), precision, 2)


def sequences(*lengths: int, seed: int = 0) -> Packed:
    ids = np.random.default_rng(seed).integers(1000, 30_000, sum(lengths)).astype(np.int32)
    return Packed(ids, np.array(lengths, np.int32))


@cache
def wanted(lengths: tuple[int, ...]) -> Float32:
    return reference(network(), sequences(*lengths))


def cosines(got: Float32, want: Float32) -> Float32:
    assert got.shape == want.shape and got.dtype == np.float32
    return (got * want).sum(1) / (np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1))


@pytest.mark.parametrize("precision", BARS)
@pytest.mark.parametrize("lengths", SHAPES)
def test_it_agrees_with_the_reference(precision: str, lengths: tuple[int, ...]) -> None:
    assert cosines(engine(precision).embed(sequences(*lengths)), wanted(lengths)).min() >= BARS[precision]


@pytest.mark.parametrize("precision", BARS)
def test_it_agrees_with_sentence_transformers(precision: str) -> None:
    peer = SentenceTransformer(str(FOLDER), device="cpu")
    peer.max_seq_length = 512
    words = ["how", "do", "i", "reset", "my", "password", "quarterly", "revenue", "photosynthesis", "late"]
    pick = np.random.default_rng(7)
    texts = [" ".join(pick.choice(words, count)) for count in (1, 2, 9, 9, 9, 30, 62, 63, 200, 510, 700)]
    rows = peer.tokenizer(texts, truncation=True, max_length=512)["input_ids"]
    packed = Packed(np.concatenate(rows).astype(np.int32), np.array([len(row) for row in rows], np.int32))
    assert packed.lengths.max() == 512
    want = peer.encode(texts, normalize_embeddings=True)
    assert cosines(engine(precision).embed(packed), want).min() >= BARS[precision]


@pytest.mark.parametrize("precision", BARS)
def test_a_text_has_the_same_vector_alone_and_in_any_batch(precision: str) -> None:
    """Order is kept too: each row of a shuffled batch must be the vector of its own text."""
    parts = [sequences(length, seed=length) for length in (1, 2, 7, 9, 30, 64, 65, 200, 512)]
    alone = np.concatenate([engine(precision).embed(part) for part in parts])
    random = np.random.default_rng(1)
    for _ in range(3):
        order = random.permutation(len(parts) * 2) % len(parts)
        together = engine(precision).embed(concat([parts[row] for row in order]))
        assert cosines(together, alone[order]).min() >= 0.9999


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_and_normalisation(pooling: bert.Pooling, normalize: bool) -> None:
    own = network(pooling, normalize)
    packed = sequences(5, 17, 2)
    got, want = TorchEngine(own, "float32", 2).embed(packed), reference(own, packed)
    assert np.allclose(got, want, atol=1e-4)
    assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5) == normalize


def test_no_texts_give_no_vectors() -> None:
    assert engine("float32").embed(sequences()).shape == (0, 384)


def test_two_threads_may_embed_at_once() -> None:
    batches = [sequences(*range(1, 20), seed=seed) for seed in range(4)]
    alone = [engine("float32").embed(batch) for batch in batches]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(engine("float32").embed, batches))
    assert cosines(np.concatenate(together), np.concatenate(alone)).min() >= 0.999999


@pytest.mark.parametrize("overhead", [0, 1, 32, 512, 10**6])
def test_runs_of_like_length_change_nothing(monkeypatch: pytest.MonkeyPatch, overhead: int) -> None:
    """From a run for every length, without padding, to one run of all, each row padded to the longest."""
    monkeypatch.setattr(torch_engine, "CPU_RUN_TOKENS", overhead)
    monkeypatch.setattr(torch_engine, "GPU_RUN_TOKENS", overhead)
    assert cosines(engine("float32").embed(sequences(*SHAPES[-1])), wanted(SHAPES[-1])).min() >= BARS["float32"]


@pytest.mark.parametrize("tokens", [1, 11, 12, 352])
def test_pieces_of_a_batch_change_nothing(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(torch_engine, "CPU_TOKENS", tokens)
    monkeypatch.setattr(torch_engine, "GPU_TOKENS", tokens)
    packed = reorder(sequences(*SHAPES[3]), np.arange(32)[::-1])
    assert cosines(engine("float32").embed(packed), wanted(SHAPES[3])[::-1]).min() >= BARS["float32"]


@pytest.mark.parametrize(
    ("tokens", "rows", "shape"),
    [
        (1, 1, (32, 8)),
        (32, 8, (32, 8)),
        (33, 8, (64, 8)),
        (32, 9, (128, 16)),
        (4096, 512, (4096, 512)),
        (4097, 1, (4097, 1)),
        (600, 513, (600, 513)),
    ],
)
def test_a_batch_takes_the_first_graph_that_holds_it(tokens: int, rows: int, shape: tuple[int, int]) -> None:
    assert fit(tokens, rows) == shape


def test_every_graph_holds_a_batch_of_its_own_shape() -> None:
    assert [fit(*shape) for shape in GRAPHS] == list(GRAPHS)


def test_what_a_forward_pass_reads_worked_by_hand() -> None:
    packed = Packed(np.array([7, 8, 9, 4, 5], np.int32), np.array([2, 3], np.int32))
    staged = lay_out(packed, tokens=7, rows=4)
    assert staged.dtype == np.int32
    assert staged[:21].reshape(3, 7).tolist() == [
        [7, 8, 9, 4, 5, 0, 0],  # ids
        [0, 1, 0, 1, 2, 0, 0],  # positions
        [0, 0, 1, 1, 1, 4, 4],  # owners: padding belongs to the row behind the last
    ]
    assert staged[21:].tolist() == [0, 2, 5, 5, 5]  # starts: rows 2 and 3 have no tokens


def test_sequences_in_another_order() -> None:
    packed = Packed(np.array([7, 8, 9, 4, 5, 6], np.int32), np.array([2, 3, 1], np.int32))
    other = reorder(packed, np.array([1, 2, 0]))
    assert (other.ids.tolist(), other.lengths.tolist()) == ([9, 4, 5, 6, 7, 8], [3, 1, 2])


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("shape", [(33, 3), (64, 8), (128, 16)])
def test_padding_up_to_a_shape_changes_nothing(pooling: bert.Pooling, shape: tuple[int, int]) -> None:
    """What a graph computes, computed without one: attention leaves the padding as it found it, here not a number."""
    own = network(pooling)
    packed = sequences(17, 9, 7)
    runs = torch_engine.run_attention(packed.lengths, 0, torch.from_numpy)

    def attention(qkv: torch.Tensor) -> torch.Tensor:
        mixed = runs(qkv)
        mixed[packed.tokens :] = float("nan")
        return mixed

    encoder = Encoder(own, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        vectors = encoder.forward(torch.from_numpy(lay_out(packed, *shape)), shape[0], attention).numpy()
    assert vectors.shape == (shape[1], 384)
    assert cosines(vectors[:3], reference(own, packed)).min() >= BARS["float32"]


def test_the_flash_kernel_is_called_as_torch_declares_it() -> None:
    """No GPU is needed to hold the call against the operator's own schema: a meta tensor has a shape and no values."""
    qkv = torch.empty(40, 3, 12, 32, dtype=torch.bfloat16, device="meta")
    starts = torch.empty(4, dtype=torch.int32, device="meta")
    mixed = flash_attention(starts, 17)(qkv)
    assert (mixed.shape, mixed.dtype) == ((40, 12, 32), torch.bfloat16)
    assert mixed.flatten(1).shape == (40, 384)


@pytest.mark.parametrize(
    ("asked", "capability", "has_bfloat16", "settled"),
    [
        ("auto", None, True, "bfloat16"),
        ("auto", None, False, "float32"),
        ("float32", None, True, "float32"),
        ("bfloat16", None, False, "bfloat16"),
        ("auto", (9, 0), False, "bfloat16"),
        ("auto", (8, 0), False, "bfloat16"),
        ("auto", (7, 5), True, "float16"),
        ("float16", (9, 0), True, "float16"),
        ("float32", (7, 5), True, "float32"),
    ],
)
def test_precision_by_device(asked: str, capability: tuple[int, int] | None, has_bfloat16: bool, settled: str) -> None:
    assert settle(asked, capability, has_bfloat16) == settled


@pytest.mark.parametrize(
    ("asked", "capability", "where"), [("float16", None, "CPU"), ("bfloat16", (7, 5), "GPU"), ("int8", (9, 0), "GPU")]
)
def test_a_precision_that_the_device_lacks_is_refused(
    asked: str, capability: tuple[int, int] | None, where: str
) -> None:
    with pytest.raises(EngineError, match=f"precision '{asked}' is not available on this {where}"):
        settle(asked, capability, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device, which computes in float16")
def test_float16_is_refused_on_a_cpu() -> None:
    with pytest.raises(EngineError, match="'float16' is not available on this CPU"):
        TorchEngine(network(), "float16", 2)


class Full(TorchEngine):
    """An engine whose GPU has no memory left."""

    def _embed(self, packed: Packed) -> Float32:
        raise torch.OutOfMemoryError


def test_memory_that_runs_out_names_the_batch_and_what_to_change() -> None:
    with pytest.raises(
        MemoryError, match=r"no memory left on .* for a batch of 23 tokens; lower batch_tokens"
    ) as raised:
        Full(network(), "float32", 2).embed(sequences(20, 3))
    assert raised.value.__context__ is None  # a traceback would keep the tensors that filled it


def test_it_passes_the_self_test_and_says_what_it_is() -> None:
    opened = open_engine(network(), "torch", "float32", 2)
    assert (opened.name, opened.precision) == ("torch", "float32")
    assert opened.device.startswith("cuda:" if torch.cuda.is_available() else "cpu")


@needs_cuda
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("lengths", [*SHAPES, (500,) * 20])
def test_graphs_and_the_flash_kernel_agree_with_the_usual_attention(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, precision: str, lengths: tuple[int, ...]
) -> None:
    """The last shape is over every graph; twice, since what a first replay left behind must not show in a second."""
    with caplog.at_level(logging.WARNING, "ray.serve"):
        half = TorchEngine(network(), precision, 2)
    assert not caplog.records  # every graph was recorded
    packed = sequences(*lengths)
    want = engine("float32").embed(packed)  # float32 takes torch's usual attention
    for _ in range(2):
        assert cosines(half.embed(packed), want).min() >= 0.9995
    replayed = half.embed(packed)
    monkeypatch.setattr(torch_engine, "fit", lambda tokens, rows: (tokens, rows))
    assert cosines(half.embed(packed), replayed).min() >= 0.9999


@needs_cuda
def test_calls_in_flight_together_on_a_gpu_do_not_mix() -> None:
    opened = TorchEngine(network(), "auto", 2)
    random = np.random.default_rng(3)
    batches = [sequences(*random.integers(1, 200, random.integers(1, 60)), seed=seed) for seed in range(200)]
    alone = [opened.embed(batch) for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(opened.embed, batches))
    assert cosines(np.concatenate(together), np.concatenate(alone)).min() >= 0.9999


@needs_cuda
def test_a_batch_over_the_memory_is_refused_and_the_engine_goes_on() -> None:
    opened = TorchEngine(network(), "auto", 2)
    torch.cuda.empty_cache()
    total_bytes = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total_bytes + 0.0005)
    try:
        with pytest.raises(MemoryError, match="lower batch_tokens"):
            opened.embed(sequences(*[512] * 64))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert np.isfinite(opened.embed(sequences(512, 9))).all()
