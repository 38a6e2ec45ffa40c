"""Engines compute vectors: one file a backend behind one Protocol; `open_engine` picks, warms up and tests one."""

import hashlib
import importlib.util
import logging
import os
import time
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from serve_app.engines.bert import Bert, reference
from serve_app.errors import EngineError
from serve_app.packing import Float32, Packed, reorder

logger = logging.getLogger("ray.serve")

Precision = Literal["float32", "bfloat16", "float16"]

# The lowest cosine to the float32 reference with which a replica may serve. Measured over 240 texts, all-MiniLM-L6-v2:
# 0.9999 in bfloat16, 1.0 in float32 to six places; a wrong layer or pooling gives less than 0.9.
SELF_TEST_COSINE = {"float32": 0.99999, "bfloat16": 0.9995, "float16": 0.9995}


class Engine(Protocol):
    """One model on one device. `embed` blocks, lets other threads run while it computes, and may be called by any
    number of threads: `lanes` keep it busy, one more is never kept waiting by these where the device allows it. A batch
    of less than `lane_tokens` had better wait for the next than have a lane beside others. One of up to `brief_tokens`
    is over too soon to be worth handing to another thread."""

    name: str
    precision: Precision
    device: str
    lanes: int
    lane_tokens: int
    brief_tokens: int

    def embed(self, packed: Packed) -> Float32:
        """Vectors, float32 [B, D], in the order of the rows."""
        ...


def choose(engine: str, precision: str, has_cuda: bool, has_openvino: bool) -> tuple[str, str]:
    """Settle `auto` by what this process can use: the backend's name, and why.

    >>> choose("auto", "auto", has_cuda=False, has_openvino=True)
    ('openvino', 'auto: no CUDA device here, OpenVINO is installed')
    """
    if engine != "auto":
        return engine, "named in the settings"
    if has_cuda:
        return "torch", "auto: this replica has a CUDA device"
    if has_openvino and precision != "float16":
        return "openvino", "auto: no CUDA device here, OpenVINO is installed"
    return "torch", "auto: no CUDA device here, and OpenVINO is not installed or has no float16 on CPU"


def sees_cuda(visible: str | None, has_driver: bool) -> bool:
    """Whether CUDA devices are meant for this process; `visible` is CUDA_VISIBLE_DEVICES, None where it is not set.

    >>> sees_cuda(None, True), sees_cuda("", True), sees_cuda("-1", True), sees_cuda("0", True), sees_cuda(None, False)
    (True, False, False, True, False)
    """
    return has_driver and visible not in ("", "-1")


def open_engine(bert: Bert, engine: str, precision: str, threads: int) -> Engine:
    """Build the engine, warm it up and hold it against the reference; raises EngineError if it fails that test."""
    if engine == "sleep":
        from serve_app.engines.sleep import SleepEngine

        logger.warning("this replica only sleeps: its vectors are not the model's")
        return SleepEngine(bert)
    # Asking torch costs seconds of import, so it is asked only where a CUDA device was handed to this process.
    has_cuda = sees_cuda(os.environ.get("CUDA_VISIBLE_DEVICES"), Path("/dev/nvidiactl").exists())
    has_openvino = importlib.util.find_spec("openvino") is not None
    backend, why = choose(engine, precision, has_cuda, has_openvino)
    started = time.perf_counter()
    built: Engine
    if backend == "openvino":
        from serve_app.engines.openvino import OpenVinoEngine

        built = OpenVinoEngine(bert, precision, threads)
    else:
        from serve_app.engines.torch import TorchEngine

        built = TorchEngine(bert, precision, threads)
    built_s = time.perf_counter() - started
    cosine = self_test(built, bert)
    logger.info(
        f"engine {built.name} on {built.device} in {built.precision} ({why}), {threads} threads: built in "
        f"{built_s:.1f} s, lowest cosine to the float32 reference {cosine:.6f}"
    )
    return built


def self_test(engine: Engine, bert: Bert) -> float:
    """The lowest cosine between the engine's vectors and the reference's, over a mixed batch and three of it alone.

    A first run before it is the warm-up. Raises EngineError under the precision's bar.
    """
    random = np.random.default_rng(384)
    lengths = np.array([3, 9, 1, 33, 20, 64], np.int32)
    # Any ids do for a comparison of arithmetic; the first thousand of a BERT vocabulary are mostly unused.
    ids = random.integers(len(bert.words) // 30, len(bert.words), int(lengths.sum())).astype(np.int32)
    packed = Packed(ids, lengths)
    rows = [1, 4, 5]  # an engine may compute a text by itself otherwise than a batch, and by its length
    alone = [reorder(packed, np.array([row])) for row in rows]
    engine.embed(alone[0])
    got, want = np.concatenate([engine.embed(each) for each in (packed, *alone)]), reference(bert, packed)
    want = np.concatenate([want, want[rows]])
    if got.shape != want.shape or got.dtype != np.float32:
        raise EngineError(f"self-test of {engine.name}: vectors are {got.dtype} {got.shape}, not float32 {want.shape}")
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1)
    cosine = float(((got * want).sum(1) / norms).min())
    bar = SELF_TEST_COSINE[engine.precision]
    if not cosine >= bar:  # also where it is not a number
        raise EngineError(
            f"self-test of {engine.name} in {engine.precision}: the lowest cosine to the float32 reference is "
            f"{cosine:.6f}, under {bar}; this replica will not serve"
        )
    return cosine


def fingerprint(weights_digest: str, engine: Engine) -> str:
    """Twelve hex digits that change when weights, tokenizer, engine or precision do; equal ones give equal vectors
    up to the precision's rounding."""
    return hashlib.sha256(f"{weights_digest} {engine.name} {engine.precision}".encode()).hexdigest()[:12]
