"""The CPU engine: BERT as an OpenVINO graph, built straight from the weights.

Building it op by op takes 0.15 s and compiling 0.3 s, against 10-13 s to import torch and trace `transformers`' model,
and leaves torch out of the process. Measured beside that traced graph on two cores, this one is 0-15 % faster.
"""

import numpy as np
import openvino as ov
from openvino import Core, Model, Node
from openvino import opset15 as op

from serve_app.engines import Precision
from serve_app.engines.bert import Bert, Dense, Norm
from serve_app.errors import EngineError
from serve_app.packing import Float32, Packed, bucket, group, pad

# Most padded tokens in one launch: as many as one batch brings (`batch_tokens`), since a launch for the few rows that
# 1,024 leave over costs more than the larger activations do: 31 texts of 66 tokens took 157 ms against 172, other
# shapes the same.
LAUNCH_TOKENS = 2048
# What one launch costs before its first token, in tokens' worth of time: about 1 to 2 ms.
LAUNCH_OVERHEAD_TOKENS = 32
# An additive mask large enough to end a softmax's share, small enough for every precision.
MASKED = np.float32(-1e4)


class OpenVinoEngine:
    """BERT on the CPU, in bfloat16 where the processor multiplies in it, else float32."""

    name = "openvino"
    device = "cpu"
    lanes = 1  # one launch keeps all threads busy
    brief_tokens = 64  # a few milliseconds; waking a thread took 0.5 of the 7 that a short request took

    def __init__(self, bert: Bert, precision: str, threads: int) -> None:
        """`threads`: how many the engine may keep busy; the replica's num_cpus."""
        core = Core()
        capable = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.precision: Precision = settle(precision, capable)
        compiled = core.compile_model(
            build(bert),
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[self.precision],
                # Replicas on one machine would all be pinned to the same first cores.
                "ENABLE_CPU_PINNING": False,
            },
        )
        self._request = compiled.create_infer_request()
        self._dimensions = bert.dimensions

    def embed(self, packed: Packed) -> Float32:
        """Vectors, float32 [B, D], in the order of the rows; rows of like length run together."""
        vectors = np.empty((packed.rows, self._dimensions), np.float32)
        for rows in group(packed.lengths, LAUNCH_TOKENS, LAUNCH_OVERHEAD_TOKENS):
            # OpenVINO prepares and keeps kernels for each shape it meets: 3 ms and about 1 MB each, with no end to them
            # if shapes were left as they come.
            shape = bucket(len(rows), int(packed.lengths[rows[0]]))
            self._request.infer(list(pad(packed, rows, shape)), share_inputs=True)
            vectors[rows] = self._request.get_output_tensor(0).data[: len(rows)]
        return vectors


def settle(precision: str, has_bfloat16: bool) -> Precision:
    """The precision that is really used; raises EngineError for one that this processor or OpenVINO lacks."""
    if precision == "auto":
        return "bfloat16" if has_bfloat16 else "float32"
    if precision == "float32":
        return "float32"
    if precision == "bfloat16" and has_bfloat16:
        return "bfloat16"
    raise EngineError(f"precision {precision!r} is not available on this CPU; use 'auto' or 'float32'")


def build(bert: Bert) -> Model:
    """The graph: ids int32 [B, S] and lengths int32 [B] to vectors float32 [B, H]."""
    hidden, width = bert.dimensions, bert.dimensions // bert.heads

    def constant(array: np.ndarray | np.generic) -> Node:
        return op.constant(np.asarray(array, order="C"))

    def shape(*numbers: int) -> Node:
        return op.constant(np.array(numbers, np.int64))

    def dense(x: Node, d: Dense) -> Node:
        return op.add(op.matmul(x, constant(d.weight), False, True), constant(d.bias))

    def norm(x: Node, n: Norm) -> Node:
        centred = op.mvn(x, shape(-1), True, bert.epsilon, "inside_sqrt")
        return op.add(op.multiply(centred, constant(n.scale)), constant(n.shift))

    def heads(x: Node) -> Node:  # [B, S, H] -> [B, A, S, W]
        return op.transpose(op.reshape(x, shape(0, 0, bert.heads, width), True), shape(0, 2, 1, 3))

    ids = op.parameter([-1, -1], np.int32, name="ids")
    lengths = op.parameter([-1], np.int32, name="lengths")
    longest = op.squeeze(op.gather(op.shape_of(ids, "i32"), shape(1), shape(0)), shape(0))
    places = op.range(constant(np.int32(0)), longest, constant(np.int32(1)), "i32")  # [S]
    inside = op.less(op.unsqueeze(places, shape(0)), op.unsqueeze(lengths, shape(1)))  # [B, S]
    mask = op.unsqueeze(op.select(inside, constant(np.float32(0)), constant(MASKED)), shape(1, 2))  # [B, 1, 1, S]

    words = op.gather(constant(bert.words), ids, shape(0))
    x = norm(op.add(words, op.gather(constant(bert.positions), places, shape(0))), bert.norm)  # [B, S, H]
    for layer in bert.layers:
        # Three products beat one joined product here: its result would have to be split and copied.
        query, key, value = (
            heads(dense(x, Dense(layer.qkv.weight[part], layer.qkv.bias[part])))
            for part in (slice(0, hidden), slice(hidden, 2 * hidden), slice(2 * hidden, 3 * hidden))
        )
        scores = op.multiply(op.matmul(query, key, False, True), constant(np.float32(width**-0.5)))
        mixed = op.matmul(op.softmax(op.add(scores, mask), -1), value, False, False)  # [B, A, S, W]
        mixed = op.reshape(op.transpose(mixed, shape(0, 2, 1, 3)), shape(0, 0, hidden), True)
        x = norm(op.add(dense(mixed, layer.out), x), layer.out_norm)
        inner = op.gelu(dense(x, layer.up), "erf")
        x = norm(op.add(dense(inner, layer.down), x), layer.down_norm)

    if bert.pooling == "mean":
        weights = op.unsqueeze(op.convert(inside, "f32"), shape(1))  # [B, 1, S]
        total = op.squeeze(op.matmul(weights, x, False, False), shape(1))  # [B, H]
        vectors = op.divide(total, op.convert(op.unsqueeze(lengths, shape(1)), "f32"))
    else:
        vectors = op.squeeze(op.gather(x, shape(0), shape(1)), shape(1))
    if bert.normalize:
        vectors = op.normalize_l2(vectors, shape(-1), 1e-12, "max")
    return ov.Model([vectors], [ids, lengths], "bert")
