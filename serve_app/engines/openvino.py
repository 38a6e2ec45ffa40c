"""The CPU engine: BERT as an OpenVINO graph, built straight from the weights.

Building it op by op takes 0.15 s and compiling 0.1 s, against 10-13 s to import torch and trace `transformers`' model,
and leaves torch out of the process. Measured beside that traced graph on two cores, this one is 0-15 % faster.

Batches run on lanes of one thread each. Threads that share a batch wait for each other some sixty times in it, and
while another process has one of their cores, all of them do; lanes never wait. But a small batch is mostly the reading
of weights, so one twice as large in half the time is better than two side by side: it gets all threads while it is
alone. So does one long text, since there it is the time of one answer that counts. A fifth of what a short query takes
is work around its shapes, so there are graphs that have them fixed, with the same vectors.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from queue import LifoQueue

import numpy as np
import openvino as ov
from openvino import Core, InferRequest, Model, Node
from openvino import opset15 as op

from serve_app.engines import Precision
from serve_app.engines.bert import Bert, Dense, Norm
from serve_app.errors import EngineError
from serve_app.packing import Float32, Packed, bucket, group, lay_out, reorder

# Most cells of the rectangle in which one launch computes attention.
LAUNCH_CELLS = 4096
# What one launch costs before its first token, in cells' worth of time: 0.9 ms, and 0.02 ms a cell, since of a cell
# without a token only attention is computed.
LAUNCH_OVERHEAD_CELLS = 48
# A batch of at most so many tokens gets all threads while it is alone.
WIDE_TOKENS = 256
# A longer text gets them only if no two calls ran at once for so long: else the next call would be in its way.
CALM_S = 0.1
# Tokens by which the shape of a launch grows at least: so few cost next to nothing while weights are read from memory.
STEP = 16
# Lengths, in tokens, of one text by itself for which there is a graph of fixed shape, of 30 MB and 0.1 s of the start.
FIXED_LENGTHS = 16, 32
# An additive mask large enough to end a softmax's share, small enough for every precision.
MASKED = np.float32(-1e4)


class OpenVinoEngine:
    """BERT on the CPU, in bfloat16 where the processor multiplies in it, else float32."""

    name = "openvino"
    device = "cpu"
    # With 16 instead, and small batches never wide, 8 connections with queries of 9 words got 4 to 11 % less done.
    lane_tokens = 128
    # 2 to 3 ms, to which handing it to another thread, and back, would add up to a third.
    brief_tokens = 32

    def __init__(self, bert: Bert, precision: str, threads: int) -> None:
        """`threads`: how many the engine may keep busy; the replica's num_cpus."""
        core = Core()
        capable = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.precision: Precision = settle(precision, capable)
        self.lanes = threads
        self._dimensions = bert.dimensions
        # By a text's length: how many columns of a rectangle it takes.
        self._columns = np.array([bucket(length, 16, STEP) for length in range(len(bert.positions) + 1)], np.int32)
        graph = build(bert)

        def request(threads: int, graph: Model = graph) -> InferRequest:
            options = {
                # One stream computes in the thread that calls, several only in threads of their own.
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[self.precision],
                # Replicas on one machine would all be pinned to the same first cores.
                "ENABLE_CPU_PINNING": False,
            }
            return core.compile_model(graph, "CPU", options).create_infer_request()

        # A call takes a lane from here and brings it back, the last one first. There is one more than threads, so that
        # a short text need not wait for the batches of a long list.
        self._free: LifoQueue[InferRequest] = LifoQueue()
        shapes = [(length, 1, length) for length in FIXED_LENGTHS]
        with ThreadPoolExecutor(threads) as pool:
            fixed = pool.map(request, repeat(threads), [fix(graph, *shape) for shape in shapes])
            self._wide, *lanes = pool.map(request, [threads] + [1] * (threads + 1))
            self._fixed = dict(zip(shapes, fixed, strict=True))
        for lane in lanes:
            self._free.put(lane)
        self._shared_s = 0.0  # when two calls last ran at once, by time.monotonic()

    def embed(self, packed: Packed) -> Float32:
        """Vectors, float32 [B, D], in the order of the rows; rows of like length run together."""
        lane = self._free.get()
        try:
            now = time.monotonic()
            is_alone = self._free.qsize() == self.lanes
            if not is_alone:
                self._shared_s = now
            is_wide = packed.tokens <= WIDE_TOKENS or (packed.rows == 1 and now - self._shared_s > CALM_S)
            request = self._wide if is_alone and is_wide else lane
            vectors = np.empty((packed.rows, self._dimensions), np.float32)
            columns = self._columns[packed.lengths]
            for rows in group(columns, LAUNCH_CELLS, LAUNCH_OVERHEAD_CELLS):
                part = reorder(packed, rows) if packed.rows > 1 else packed
                # OpenVINO prepares itself anew, 1.2 ms, when a shape is not that of the run before, and keeps kernels
                # for each shape it meets. So shapes are few, and texts of one kind mostly meet the same.
                shape = bucket(part.tokens, 32, STEP), bucket(part.rows, 8), int(columns[rows[0]])
                grid = lay_out(part, *shape)
                fit = self._fixed.get(shape, request) if request is self._wide else request
                fit.infer([grid.ids, grid.positions, grid.places, grid.lengths, grid.cells], share_inputs=True)
                vectors[rows] = fit.get_output_tensor(0).data[: len(rows)]
            return vectors
        finally:
            self._free.put(lane)


def settle(precision: str, has_bfloat16: bool) -> Precision:
    """The precision that is really used; raises EngineError for one that this processor or OpenVINO lacks."""
    if precision == "auto":
        return "bfloat16" if has_bfloat16 else "float32"
    if precision == "float32":
        return "float32"
    if precision == "bfloat16" and has_bfloat16:
        return "bfloat16"
    raise EngineError(f"precision {precision!r} is not available on this CPU; use 'auto' or 'float32'")


def fix(graph: Model, tokens: int, rows: int, columns: int) -> Model:
    """The same graph for a grid of this shape alone."""
    fixed = graph.clone()
    ids, positions, places, lengths, cells = fixed.inputs
    fixed.reshape({ids: [tokens], positions: [tokens], places: [rows, columns], lengths: [rows], cells: [tokens]})
    return fixed


def build(bert: Bert) -> Model:
    """The graph, from packed tokens to vectors float32 [B, H]; its inputs are the fields of `packing.Grid`, in order.

    Only attention sees the rectangle, so nothing else computes padding: that is 10 to 15 % of a batch of short texts.
    """
    hidden, width = bert.dimensions, bert.dimensions // bert.heads

    def constant(array: np.ndarray | np.generic) -> Node:
        return op.constant(np.asarray(array, order="C"))

    def shape(*numbers: int) -> Node:
        return op.constant(np.array(numbers, np.int64))

    def parameter(name: str, dimensions: int = 1) -> Node:
        return op.parameter([-1] * dimensions, np.int32, name=name)

    def dense(x: Node, d: Dense) -> Node:
        return op.add(op.matmul(x, constant(d.weight), False, True), constant(d.bias))

    def norm(x: Node, n: Norm) -> Node:
        centred = op.mvn(x, shape(-1), True, bert.epsilon, "inside_sqrt")
        return op.add(op.multiply(centred, constant(n.scale)), constant(n.shift))

    def spread(x: Node) -> Node:  # [T, H] -> [B, S, H]
        return op.gather(x, places, shape(0))

    def collect(x: Node) -> Node:  # [B, S, A, W] -> [T, H]
        return op.gather(op.reshape(x, shape(-1, hidden), False), cells, shape(0))

    def heads(x: Node) -> Node:  # [T, H] -> [B, A, S, W]
        return op.transpose(op.reshape(spread(x), shape(0, 0, bert.heads, width), True), shape(0, 2, 1, 3))

    ids, positions, places = parameter("ids"), parameter("positions"), parameter("places", 2)
    lengths, cells = parameter("lengths"), parameter("cells")
    longest = op.squeeze(op.gather(op.shape_of(places, "i32"), shape(1), shape(0)), shape(0))
    columns = op.range(constant(np.int32(0)), longest, constant(np.int32(1)), "i32")  # [S]
    inside = op.less(op.unsqueeze(columns, shape(0)), op.unsqueeze(lengths, shape(1)))  # [B, S]
    mask = op.unsqueeze(op.select(inside, constant(np.float32(0)), constant(MASKED)), shape(1, 2))  # [B, 1, 1, S]

    words = op.gather(constant(bert.words), ids, shape(0))
    x = norm(op.add(words, op.gather(constant(bert.positions), positions, shape(0))), bert.norm)  # [T, H]
    for layer in bert.layers:
        # Three products beat one joined product here: its result would have to be split and copied.
        query, key, value = (
            heads(dense(x, Dense(layer.qkv.weight[part], layer.qkv.bias[part])))
            for part in (slice(0, hidden), slice(hidden, 2 * hidden), slice(2 * hidden, 3 * hidden))
        )
        scores = op.multiply(op.matmul(query, key, False, True), constant(np.float32(width**-0.5)))
        mixed = op.matmul(op.softmax(op.add(scores, mask), -1), value, False, False)  # [B, A, S, W]
        mixed = collect(op.transpose(mixed, shape(0, 2, 1, 3)))
        x = norm(op.add(dense(mixed, layer.out), x), layer.out_norm)
        inner = op.gelu(dense(x, layer.up), "erf")
        x = norm(op.add(dense(inner, layer.down), x), layer.down_norm)

    if bert.pooling == "mean":
        weights = op.unsqueeze(op.convert(inside, "f32"), shape(1))  # [B, 1, S]
        total = op.squeeze(op.matmul(weights, spread(x), False, False), shape(1))  # [B, H]
        vectors = op.divide(total, op.convert(op.unsqueeze(lengths, shape(1)), "f32"))
    else:
        vectors = op.squeeze(op.gather(spread(x), shape(0), shape(1)), shape(1))
    if bert.normalize:
        vectors = op.normalize_l2(vectors, shape(-1), 1e-12, "max")
    return ov.Model([vectors], [ids, positions, places, lengths, cells], "bert")
