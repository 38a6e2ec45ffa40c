"""The GPU engine, and the CPU's where OpenVINO is not: BERT in torch over packed sequences.

The tokens of all sequences lie end to end, [T, H], so no product computes padding; only attention asks where a
sequence ends. On a GPU from Ampere on, that is the flash kernel for unlike lengths that torch carries; elsewhere it is
torch's usual attention over runs of like length. A small batch on a GPU replays a recorded graph, since it is computed
sooner than Python launches its hundred kernels one by one.
"""

import logging
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from serve_app.engines import Precision
from serve_app.engines.bert import Bert, Dense, Norm
from serve_app.errors import EngineError
from serve_app.packing import Float32, Int32, Packed, group, positions, reorder, split

logger = logging.getLogger("ray.serve")

# Most tokens that go through the layers together. A CPU gains nothing from more (512 to 4,096 measure the same, all
# at once up to 12 % slower); a GPU is busy with fewer, and more would only take its memory.
CPU_TOKENS, GPU_TOKENS = 1024, 32768
# What one more run of attention costs before its first token, in tokens' worth of time: on a CPU nothing that could
# be measured, so only equal lengths share a run; on a GPU some ten launches (on an H100 in float32, 24 unlike rows were
# 1.8 times as fast with 2,048 as with 512, and 256 rows equally fast with either).
CPU_RUN_TOKENS, GPU_RUN_TOKENS = 0, 2048
# The shapes that have a graph, (tokens, rows). A batch takes the first that holds it: up to half of that is padding,
# but such a batch is bound by launches, not by tokens: an H100 computes 1,024 tokens in 0.4 ms and 16,384 in 2, and
# Python takes 2 ms to launch either. With two calls in flight graphs of 8,192 and more gained nothing. A short text has
# some eight tokens, so rows seldom decide.
GRAPHS = tuple((tokens, max(8, tokens // 8)) for tokens in (32, 64, 128, 256, 512, 1024, 2048, 4096))
# Calls on the GPU at once: while one computes, ids of the other are laid out, copied, launched. A third adds nothing.
LANES = 2

Attention = Callable[[Tensor], Tensor]  # queries, keys and values [T, 3, A, W] -> [T, A, W]
Pair = tuple[Tensor, Tensor]  # weight and bias, or scale and shift


class Encoder:
    """BERT's weights on one device, and its forward pass over packed tokens."""

    def __init__(self, bert: Bert, device: torch.device, dtype: torch.dtype) -> None:
        def tensor(array: Float32, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(array, dtype=dtype, device=device)

        def pair(part: Dense | Norm) -> Pair:
            first, second = (part.weight, part.bias) if isinstance(part, Dense) else (part.scale, part.shift)
            return tensor(first, dtype), tensor(second, dtype)

        self._dtype, self._pooling, self._normalize = dtype, bert.pooling, bert.normalize
        self._heads, self._hidden, self._epsilon = bert.heads, bert.dimensions, bert.epsilon
        # Tables are only looked up, so float32 costs next to nothing, and their sum is rounded once, after its norm.
        self._words, self._positions = tensor(bert.words), tensor(bert.positions)
        self._norm = tensor(bert.norm.scale), tensor(bert.norm.shift)
        self._layers = [
            [pair(part) for part in (layer.qkv, layer.out, layer.out_norm, layer.up, layer.down, layer.down_norm)]
            for layer in bert.layers
        ]

    def forward(self, staged: Tensor, tokens: int, attention: Attention) -> Tensor:
        """Vectors, float32 [B, H], of what `lay_out` laid out in `tokens` tokens."""
        ids, positions, owners = staged[: 3 * tokens].view(3, tokens)
        starts = staged[3 * tokens :]
        shape, epsilon = (self._hidden,), self._epsilon
        x = functional.embedding(ids, self._words) + functional.embedding(positions, self._positions)
        x = functional.layer_norm(x, shape, *self._norm, epsilon).to(self._dtype)  # [T, H]
        for qkv, out, out_norm, up, down, down_norm in self._layers:
            mixed = attention(functional.linear(x, *qkv).view(tokens, 3, self._heads, -1))  # [T, A, W]
            x = functional.layer_norm(x + functional.linear(mixed.flatten(1), *out), shape, *out_norm, epsilon)
            inner = functional.gelu(functional.linear(x, *up))  # [T, I]
            x = functional.layer_norm(x + functional.linear(inner, *down), shape, *down_norm, epsilon)
        if self._pooling == "mean":
            # A last row takes in the padding, and is cut off.
            sums = torch.zeros(len(starts), self._hidden, device=x.device).index_add_(0, owners, x.float())
            vectors = sums[:-1] / starts.diff().clamp(min=1)[:, None]
        else:
            vectors = x.index_select(0, starts[:-1].clamp(max=tokens - 1)).float()
        return functional.normalize(vectors, dim=1, eps=1e-12) if self._normalize else vectors


class Lane(NamedTuple):
    """What one call in flight has to itself. A stream runs in order, so its graphs can share their memory."""

    stream: torch.cuda.Stream
    done: torch.cuda.Event
    # By shape: a recorded forward pass, the tensor it reads and the vectors it writes.
    graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]]


class TorchEngine:
    """BERT on the first GPU that this process sees, else on the CPU.

    `embed` is safe for any number of threads. On a GPU two calls at once overlap the copies and launches of one with
    the computing of the other, and a third waits; on a CPU one call keeps all its threads busy by itself.
    """

    # On an H100 two batches at once did less than one of both up to 2,046 tokens each (half as much at 11), and a third
    # more at 4,092.
    name, lane_tokens, brief_tokens = "torch", 4096, 0

    def __init__(self, bert: Bert, precision: str, threads: int) -> None:
        """`threads`: how many the CPU may keep busy, for the whole process; a GPU does not ask for it."""
        capability = torch.cuda.get_device_capability(0) if torch.cuda.is_available() else None
        # Not oneDNN's answer, which is yes on all of AVX-512: it emulates what the processor lacks.
        has_bfloat16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        self.precision: Precision = settle(precision, capability, has_bfloat16)
        self._gpu = capability is not None
        self.lanes = LANES if self._gpu else 1
        self.device = f"cuda:{torch.cuda.get_device_name(0)}" if self._gpu else "cpu"
        self._place = torch.device("cuda:0" if self._gpu else "cpu")
        self._dimensions, self._max_tokens = bert.dimensions, len(bert.positions)
        # What the kernel takes: `mha_varlen_fwd` in torch's aten/src/ATen/native/transformers/cuda/flash_attn.
        fits = self.precision != "float32" and (width := bert.dimensions // bert.heads) % 8 == 0 and width <= 256
        self._flash = fits and capability is not None and capability >= (8, 0)
        if not self._gpu:
            torch.set_num_threads(threads)
        self._lanes: SimpleQueue[Lane] = SimpleQueue()
        with torch.inference_mode():
            self._encoder = Encoder(bert, self._place, getattr(torch, self.precision))
            if self._gpu:
                self._open_lanes()

    def embed(self, packed: Packed) -> Float32:
        """Vectors, float32 [B, D], in the order of the rows; raises MemoryError where the GPU's is too small."""
        order = np.argsort(-packed.lengths, kind="stable")  # so that rows of like length stand together
        vectors = np.empty((packed.rows, self._dimensions), np.float32)
        stop = 0
        try:
            with torch.inference_mode():
                for piece in split(reorder(packed, order), GPU_TOKENS if self._gpu else CPU_TOKENS):
                    start, stop = stop, stop + piece.rows
                    vectors[order[start:stop]] = self._embed(piece)
            return vectors
        except torch.OutOfMemoryError:
            pass
        # Out here the error is gone, and with it its traceback, which held the call's tensors.
        torch.cuda.empty_cache()
        raise MemoryError(f"no memory left on {self.device} for a batch of {packed.tokens} tokens; lower batch_tokens")

    def _embed(self, packed: Packed) -> Float32:
        if not self._gpu:
            return self._compute(packed).numpy()
        lane = self._lanes.get()
        try:
            with torch.cuda.stream(lane.stream):
                shape = fit(packed.tokens, packed.rows)
                if shape in lane.graphs:
                    recorded, staged, vectors = lane.graphs[shape]
                    staged.copy_(torch.from_numpy(lay_out(packed, *shape)).pin_memory(), non_blocking=True)
                    recorded.replay()
                    vectors = vectors[: packed.rows]
                else:
                    vectors = self._compute(packed)
                answer = vectors.to("cpu", non_blocking=True)  # into pinned memory
                lane.done.record()
                lane.done.synchronize()
            return answer.numpy()
        finally:
            self._lanes.put(lane)

    def _compute(self, packed: Packed) -> Tensor:
        """Vectors, float32 [B, H] on the device, of rows that stand longest first, without a graph."""
        staged = self._send(lay_out(packed, packed.tokens, packed.rows))
        if self._flash:
            attention = flash_attention(staged[3 * packed.tokens :], int(packed.lengths[0]))
        else:
            attention = run_attention(packed.lengths, GPU_RUN_TOKENS if self._gpu else CPU_RUN_TOKENS, self._send)
        return self._encoder.forward(staged, packed.tokens, attention)

    def _send(self, array: NDArray[Any]) -> Tensor:
        """Copy to the device without waiting; torch keeps the pinned memory until the stream has read it."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self._place, non_blocking=True) if self._gpu else tensor

    def _open_lanes(self) -> None:
        # The weights went out on this thread's stream, for which the lanes' streams do not wait by themselves.
        torch.cuda.synchronize()
        for _ in range(LANES):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            # A blocking event lets the waiting thread sleep: its core is a tokenizer's.
            lane = Lane(stream, torch.cuda.Event(blocking=True), {})  # type: ignore[no-untyped-call]
            try:
                self._record(lane)
            except RuntimeError as error:
                # It only makes small batches slower; if the device itself is lost, the self-test finds it.
                logger.warning(f"{self.device}: CUDA graphs could not be recorded, small batches are slower: {error}")
            self._lanes.put(lane)

    def _record(self, lane: Lane) -> None:
        """Record every shape in GRAPHS for the flash kernel, largest first: the others fit into its memory."""
        pool = torch.cuda.graph_pool_handle()
        one = Packed(np.zeros(1, np.int32), np.ones(1, np.int32))
        for tokens, rows in reversed(GRAPHS if self._flash else ()):
            with torch.cuda.stream(lane.stream):
                staged = self._send(lay_out(one, tokens, rows))
                attention = flash_attention(staged[3 * tokens :], min(tokens, self._max_tokens))
                # Once outside: what a first call loads and allocates may not happen inside a recording.
                self._encoder.forward(staged, tokens, attention)
                recorded = torch.cuda.CUDAGraph()
                # On the lane's own stream, since products have scratch memory by stream; and guarding this thread
                # alone, since another engine may be at work in this process.
                with torch.cuda.graph(recorded, pool, lane.stream, capture_error_mode="thread_local"):
                    vectors = self._encoder.forward(staged, tokens, attention)
                lane.graphs[tokens, rows] = recorded, staged, vectors


def settle(precision: str, capability: tuple[int, int] | None, has_bfloat16: bool) -> Precision:
    """The precision that is really used; raises EngineError for one that the device lacks.

    capability: the GPU's, None on a CPU. has_bfloat16: whether the CPU computes in it; by name it can be had anyway.
    """
    if precision == "float32" or (precision == "auto" and capability is None and not has_bfloat16):
        return "float32"
    if precision in ("auto", "bfloat16") and (capability is None or capability >= (8, 0)):
        return "bfloat16"
    if precision in ("auto", "float16") and capability is not None:
        return "float16"
    where = "CPU" if capability is None else f"GPU, of compute capability {capability}"
    raise EngineError(f"precision {precision!r} is not available on this {where}; use 'auto' or 'float32'")


def fit(tokens: int, rows: int) -> tuple[int, int]:
    """The smallest graph's shape that holds a batch, or its own shape where none does.

    >>> fit(60, 3), fit(60, 9), fit(5000, 9)
    ((64, 8), (128, 16), (5000, 9))
    """
    return next((shape for shape in GRAPHS if tokens <= shape[0] and rows <= shape[1]), (tokens, rows))


def lay_out(packed: Packed, tokens: int, rows: int) -> Int32:
    """All that a forward pass reads, in one array and so one copy, padded to `tokens` and `rows`.

    int32: ids [T], positions [T], owners [T] (the row of each token), starts [B + 1] (where each row begins, and the
    last ends). Padding tokens belong to row B, which does not exist; padding rows have no tokens.
    """
    staged = np.zeros(3 * tokens + rows + 1, np.int32)
    ids, places, owners = staged[: 3 * tokens].reshape(3, tokens)
    starts = staged[3 * tokens :]
    starts[1 : packed.rows + 1] = np.cumsum(packed.lengths)
    starts[packed.rows + 1 :] = packed.tokens
    owners[:] = rows
    owners[: packed.tokens] = np.repeat(np.arange(packed.rows), packed.lengths)
    ids[: packed.tokens] = packed.ids
    places[: packed.tokens] = positions(packed)
    return staged


def flash_attention(starts: Tensor, longest: int) -> Attention:
    """One kernel over rows of unlike length, none over `longest`.

    It skips rows without tokens, and gives padding tokens what memory held: no other token ever sees their values.
    """
    # The module takes more than a second to import, which a CPU is spared.
    from torch.nn.attention.varlen import varlen_attn

    def attention(qkv: Tensor) -> Tensor:
        query, key, value = qkv.unbind(1)
        return cast(Tensor, varlen_attn(query, key, value, starts, starts, longest, longest))

    return attention


def run_attention(lengths: Int32, overhead_tokens: int, send: Callable[[NDArray[Any]], Tensor]) -> Attention:
    """Torch's usual attention over runs of rows, which stand longest first; `send` brings indices to the device.

    Rows of equal length are a view. Unlike ones are padded while that costs less than one more run.
    """
    runs: list[tuple[slice, int, list[Tensor] | None]] = []
    stop = 0
    for rows in group(lengths, GPU_TOKENS, overhead_tokens):
        own, indices = lengths[rows], None
        start, stop = stop, stop + int(own.sum())
        if own[0] > own[-1]:
            inside = np.arange(own[0]) < own[:, None]  # [b, S]
            tokens = start - 1 + np.cumsum(inside).reshape(inside.shape)  # padding repeats the row's last token
            indices = [send(array) for array in (tokens, inside[:, None, None], np.flatnonzero(inside))]
        runs.append((slice(start, stop), len(rows), indices))

    def attention(qkv: Tensor) -> Tensor:
        mixed = torch.empty_like(qkv[:, 0])
        for span, rows, indices in runs:
            tokens, mask, places = indices or (None, None, None)
            padded = qkv[span].view(rows, -1, *qkv.shape[1:]) if tokens is None else qkv[tokens]  # [b, S, 3, A, W]
            query, key, value = padded.permute(2, 0, 3, 1, 4)
            own = functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(0, 1)
            mixed[span] = own if places is None else own[places]
        return mixed

    return attention
