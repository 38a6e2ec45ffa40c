"""Engines against the definition: parity, batches that change nothing, order, pooling, a self-test that can fail."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openvino import InferRequest

from serve_app import engines
from serve_app.engines import bert, choose, open_engine, self_test
from serve_app.engines.bert import Bert, reference
from serve_app.engines.openvino import OpenVinoEngine, settle
from serve_app.errors import EngineError
from serve_app.packing import Float32, Packed, concat
from serve_app.scheduler import Entry, Scheduler
from tests.model import FOLDER


@pytest.fixture(scope="module")
def network() -> Bert:
    return bert.load(FOLDER, "mean", normalize=True)


def sequences(*lengths: int, seed: int = 0) -> Packed:
    ids = np.random.default_rng(seed).integers(1000, 30_000, sum(lengths)).astype(np.int32)
    return Packed(ids, np.array(lengths, np.int32))


def cosines(got: Float32, want: Float32) -> Float32:
    assert got.shape == want.shape and got.dtype == np.float32
    return (got * want).sum(1) / (np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1))


@pytest.mark.parametrize(("precision", "bar"), [("float32", 0.999999), ("auto", 0.9995)])
@pytest.mark.parametrize("lengths", [(1,), (9,), (512,), (11,) * 32, (3, 200, 1, 64, 5, 511, 9, 33, 2, 2)])
def test_openvino_agrees_with_the_reference(network: Bert, precision: str, bar: float, lengths: tuple[int]) -> None:
    packed = sequences(*lengths)
    assert cosines(OpenVinoEngine(network, precision, 2).embed(packed), reference(network, packed)).min() >= bar


def test_the_reference_knows_the_error_function() -> None:
    x = np.linspace(-6, 6, 10_001, dtype=np.float32)
    want = [math.erf(value) for value in x]
    np.testing.assert_allclose(bert.erf(x), want, rtol=0, atol=2e-7)
    assert bert.erf(x).dtype == np.float32


def test_a_text_has_the_same_vector_alone_and_in_any_batch(network: Bert) -> None:
    engine = OpenVinoEngine(network, "auto", 2)
    parts = [sequences(length, seed=length) for length in (2, 7, 9, 30, 64, 65, 200, 512)]
    alone = np.concatenate([engine.embed(part) for part in parts])
    random = np.random.default_rng(1)
    for _ in range(10):
        order = random.permutation(len(parts) * 3) % len(parts)
        together = engine.embed(concat([parts[row] for row in order]))
        assert cosines(together, alone[order]).min() >= 0.9999


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_and_normalisation(pooling: bert.Pooling, normalize: bool) -> None:
    network = bert.load(FOLDER, pooling, normalize)
    packed = sequences(5, 17, 2)
    got, want = OpenVinoEngine(network, "float32", 2).embed(packed), reference(network, packed)
    assert np.allclose(got, want, atol=1e-4)
    assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5) == normalize


@pytest.mark.parametrize(
    ("asked", "has_bfloat16", "settled"),
    [
        ("auto", True, "bfloat16"),
        ("auto", False, "float32"),
        ("float32", True, "float32"),
        ("bfloat16", True, "bfloat16"),
    ],
)
def test_precision_on_a_cpu(asked: str, has_bfloat16: bool, settled: str) -> None:
    assert settle(asked, has_bfloat16) == settled


@pytest.mark.parametrize(("asked", "has_bfloat16"), [("bfloat16", False), ("float16", True)])
def test_a_precision_that_the_processor_lacks_is_refused(asked: str, has_bfloat16: bool) -> None:
    with pytest.raises(EngineError, match=f"precision '{asked}' is not available on this CPU"):
        settle(asked, has_bfloat16)


@pytest.mark.parametrize(
    ("engine", "precision", "cuda", "openvino", "chosen"),
    [
        ("auto", "auto", True, True, "torch"),
        ("auto", "auto", False, True, "openvino"),
        ("auto", "auto", False, False, "torch"),
        ("auto", "float16", False, True, "torch"),
        ("torch", "auto", False, True, "torch"),
        ("openvino", "auto", True, True, "openvino"),
    ],
)
def test_auto_picks_by_device_and_says_why(
    engine: str, precision: str, cuda: bool, openvino: bool, chosen: str
) -> None:
    backend, why = choose(engine, precision, cuda, openvino)
    assert backend == chosen
    assert why.startswith("auto: ") == (engine == "auto")


class Wrong:
    """An engine whose vectors a function of the reference's makes wrong."""

    name, precision, device, lanes, lane_tokens, brief_tokens = "wrong", "float32", "cpu", 1, 1, 0

    def __init__(self, network: Bert, spoil: object) -> None:
        self._network, self._spoil = network, spoil

    def embed(self, packed: Packed) -> Float32:
        return self._spoil(reference(self._network, packed))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v: v[::-1], "lowest cosine"),
        (lambda v: v + np.float32(0.01), "lowest cosine"),
        (lambda v: v * np.float32("nan"), "lowest cosine .* nan"),
        (lambda v: v[:, :-1], "not float32"),
        (lambda v: v.astype(np.float64), "not float32"),
    ],
)
def test_an_engine_with_wrong_vectors_does_not_serve(network: Bert, spoil: object, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        self_test(Wrong(network, spoil), network)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [9, 20, 64])
def test_an_engine_that_is_wrong_about_a_text_alone_does_not_serve(network: Bert, tokens: int) -> None:
    """OpenVINO has a graph of its own for up to 16 tokens, and one for up to 32."""

    class WrongAlone(Wrong):
        def embed(self, packed: Packed) -> Float32:
            right = reference(self._network, packed)
            return right + np.float32(0.01) if packed.rows == 1 and packed.tokens == tokens else right

    with pytest.raises(EngineError, match="lowest cosine"):
        self_test(WrongAlone(network, None), network)  # type: ignore[arg-type]


def test_the_self_test_passes_a_right_engine(network: Bert) -> None:
    assert self_test(Wrong(network, lambda v: v * np.float32(3)), network) == pytest.approx(1.0)  # type: ignore[arg-type]


def test_the_sleeping_engine_takes_its_time_and_tells_texts_and_orders_apart(network: Bert) -> None:
    engine = open_engine(network, "sleep", "auto", 1)
    packed = Packed(np.array([101, 2000, 102, 101, 3000, 4000, 102], np.int32), np.array([3, 4], np.int32))
    started = time.monotonic()
    vectors = engine.embed(packed)
    assert time.monotonic() - started >= 0.012
    assert vectors.shape == (2, network.dimensions) and vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    alone = engine.embed(Packed(packed.ids[3:], packed.lengths[1:]))
    assert np.allclose(alone[0], vectors[1]) and float(vectors[0] @ vectors[1]) < 0.99


def test_a_fingerprint_changes_with_weights_engine_and_precision(network: Bert) -> None:
    engine = open_engine(network, "openvino", "float32", 1)
    first = engines.fingerprint("digest", engine)
    other = Wrong(network, None)
    assert len(first) == 12
    assert len({first, engines.fingerprint("digest2", engine), engines.fingerprint("digest", other)}) == 3  # type: ignore[arg-type]


def test_a_missing_tensor_and_a_wrong_shape_are_named(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    from serve_app.errors import WeightsError

    (tmp_path / "config.json").write_text((FOLDER / "config.json").read_text())
    tensors = load_file(FOLDER / "model.safetensors")
    norm = tensors.pop("embeddings.LayerNorm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"no tensor 'embeddings.LayerNorm.weight'"):
        bert.load(tmp_path, "mean", True)
    save_file(tensors | {"embeddings.LayerNorm.weight": norm[:5]}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"is \(5,\), config.json says \(384,\)"):
        bert.load(tmp_path, "mean", True)


class Seen:
    """A request to the engine that first says what it is given."""

    def __init__(self, inner: InferRequest, note: Callable[[list[Any]], None]) -> None:
        self.inner, self.note = inner, note

    def infer(self, inputs: list[Any], **options: Any) -> None:
        self.note(inputs)
        self.inner.infer(inputs, **options)

    def get_output_tensor(self, index: int) -> Any:
        return self.inner.get_output_tensor(index)


def watch_lanes(engine: OpenVinoEngine, note: Callable[[list[Any]], None]) -> None:
    for lane in [engine._free.get() for _ in range(engine.lanes + 1)]:
        engine._free.put(Seen(lane, note))  # type: ignore[arg-type]


def test_texts_that_take_as_many_columns_run_in_one_launch(network: Bert) -> None:
    """Whatever their lengths are within these: apart they would be padded as much, and to more rows."""
    engine, shapes = OpenVinoEngine(network, "auto", 2), list[tuple[int, ...]]()
    watch_lanes(engine, lambda inputs: shapes.append(inputs[2].shape))
    alike, unlike = sequences(*range(65, 81)), sequences(*[20] * 8, *[200] * 8)
    vectors = engine.embed(alike)
    assert shapes == [(16, 80)]
    engine.embed(unlike)
    assert shapes[1:] == [(8, 208), (8, 32)]
    assert cosines(vectors, reference(network, alike)).min() >= 0.9995


def test_a_small_batch_has_all_threads_while_it_is_alone(network: Bert) -> None:
    engine = OpenVinoEngine(network, "float32", 2)
    used: list[str] = []

    def note(name: str, _: list[Any]) -> None:
        used.append(name)
        if len(used) == 1:
            engine.embed(sequences(40, 40))  # while the first runs

    engine._wide = Seen(engine._wide, partial(note, "wide"))  # type: ignore[assignment]
    watch_lanes(engine, partial(note, "lane"))
    small, brief, large = sequences(40, 40), sequences(9, 9), sequences(*[60] * 6)
    vectors = engine.embed(small)
    assert used == ["wide", "lane"]  # the second was not alone
    for packed in (brief, large, small):
        engine.embed(packed)
    assert used[2:] == ["wide", "lane", "wide"]
    assert cosines(vectors, reference(network, small)).min() >= 0.999999


def test_a_short_text_by_itself_has_a_graph_of_its_shape_and_the_same_vector(network: Bert) -> None:
    engine, used = OpenVinoEngine(network, "auto", 2), list[str]()
    for shape, request in engine._fixed.items():
        engine._fixed[shape] = Seen(request, lambda _, shape=shape: used.append(f"fixed {shape[0]}"))  # type: ignore
    engine._wide = Seen(engine._wide, lambda _: used.append("wide"))  # type: ignore[assignment]
    watch_lanes(engine, lambda _: used.append("lane"))
    for tokens in (1, 16, 17, 32, 33):
        text = sequences(tokens)
        alone = engine.embed(text)
        lane = engine._free.get()  # as if another call had it
        among_others = engine.embed(text)
        engine._free.put(lane)
        # To the last bit on processors known so far; others may sum a product in another order.
        assert cosines(alone, among_others).min() >= 0.9999
    assert used == ["fixed 16", "lane"] * 2 + ["fixed 32", "lane"] * 2 + ["wide", "lane"]
    unlike = sequences(9, 200)  # in two launches
    assert cosines(engine.embed(unlike), reference(network, unlike)).min() >= 0.9995
    assert sorted(used[10:]) == ["fixed 16", "wide"]


async def test_no_text_waits_while_the_engine_is_idle_and_batches_grow_while_it_is_busy(network: Bert) -> None:
    """The real engine behind the real scheduler: arrivals come faster than single texts could be computed."""
    engine = OpenVinoEngine(network, "auto", 2)
    text = sequences(24)
    engine.embed(text)
    batches: list[tuple[float, float, int]] = []  # began, ended, rows

    async def run(entries: Sequence[Entry[Packed, float]]) -> list[float]:
        began = time.monotonic()
        await asyncio.to_thread(engine.embed, concat([entry.job for entry in entries]))
        batches.append((began, time.monotonic(), len(entries)))
        return [began] * len(entries)

    scheduler: Scheduler[Packed, float] = Scheduler(run, budget=2048)
    arrivals: list[tuple[float, asyncio.Task[float]]] = []
    for _ in range(300):
        arrivals.append((time.monotonic(), asyncio.create_task(scheduler.submit(text, text.tokens, math.inf))))
        await asyncio.sleep(0.0005)
    began = [await task for _, task in arrivals]

    assert sum(rows for _, _, rows in batches) == 300
    assert max(rows for _, _, rows in batches) > 1, "batches did not grow"
    for (arrived, _), start in zip(arrivals, began, strict=True):
        # From the arrival to the start of its own batch, the engine was at work but for the hand-over between batches.
        busy_s = sum(
            min(end, start) - max(first, arrived) for first, end, _ in batches if first < start and end > arrived
        )
        handovers = sum(1 for first, _, _ in batches if arrived <= first <= start)
        assert start - arrived - busy_s <= 0.05 * handovers
