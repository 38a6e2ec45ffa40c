"""BERT as data, and its forward pass in plain numpy.

The numpy forward is the specification: every engine must agree with it before its replica serves (`self_test`). It
follows Devlin et al. 2018 (https://arxiv.org/abs/1810.04805) as `transformers`' BertModel computes it, with float32
throughout, one sequence at a time, so there is no padding and no mask to get wrong.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import load_file

from serve_app.errors import WeightsError
from serve_app.packing import Float32, Packed

Pooling = Literal["mean", "cls"]


@dataclass(frozen=True, slots=True)
class Dense:
    """y = x @ weight.T + bias: weight float32 [out, in], bias float32 [out]."""

    weight: Float32
    bias: Float32


@dataclass(frozen=True, slots=True)
class Norm:
    """Layer normalisation over the last axis: scale and shift float32 [H]."""

    scale: Float32
    shift: Float32


@dataclass(frozen=True, slots=True)
class Layer:
    """One encoder layer; query, key and value are joined into one product, [3H, H]."""

    qkv: Dense
    out: Dense
    out_norm: Norm
    up: Dense
    down: Dense
    down_norm: Norm


@dataclass(frozen=True, slots=True)
class Bert:
    """Weights and shape of a BERT encoder with its pooling: all that an engine needs to know of a model."""

    words: Float32  # [V, H]
    positions: Float32  # [P, H], with the embedding of token type 0 added: every token here is of type 0
    norm: Norm
    layers: tuple[Layer, ...]
    heads: int
    epsilon: float
    pooling: Pooling
    normalize: bool

    @property
    def dimensions(self) -> int:
        return int(self.words.shape[1])


def load(folder: Path, pooling: Pooling, normalize: bool) -> Bert:
    """Read `config.json` and `model.safetensors`; raises WeightsError if a tensor is missing or of the wrong shape."""
    config = json.loads((folder / "config.json").read_text())
    tensors: Mapping[str, np.ndarray] = load_file(folder / "model.safetensors")
    # A checkpoint saved with a task head names every tensor "bert.…".
    prefix = "bert." if "bert.embeddings.word_embeddings.weight" in tensors else ""
    hidden, inner = config["hidden_size"], config["intermediate_size"]

    def tensor(name: str, *shape: int) -> Float32:
        found = tensors.get(prefix + name)
        if found is None:
            raise WeightsError(f"{folder}: model.safetensors holds no tensor {prefix + name!r}")
        if found.shape != shape:
            raise WeightsError(f"{folder}: tensor {prefix + name!r} is {found.shape}, config.json says {shape}")
        return np.ascontiguousarray(found, dtype=np.float32)

    def dense(name: str, out: int, inputs: int) -> Dense:
        return Dense(tensor(f"{name}.weight", out, inputs), tensor(f"{name}.bias", out))

    def norm(name: str) -> Norm:
        return Norm(tensor(f"{name}.weight", hidden), tensor(f"{name}.bias", hidden))

    def layer(name: str) -> Layer:
        parts = [dense(f"{name}.attention.self.{part}", hidden, hidden) for part in ("query", "key", "value")]
        return Layer(
            qkv=Dense(np.concatenate([p.weight for p in parts]), np.concatenate([p.bias for p in parts])),
            out=dense(f"{name}.attention.output.dense", hidden, hidden),
            out_norm=norm(f"{name}.attention.output.LayerNorm"),
            up=dense(f"{name}.intermediate.dense", inner, hidden),
            down=dense(f"{name}.output.dense", hidden, inner),
            down_norm=norm(f"{name}.output.LayerNorm"),
        )

    types = tensor("embeddings.token_type_embeddings.weight", config["type_vocab_size"], hidden)
    return Bert(
        words=tensor("embeddings.word_embeddings.weight", config["vocab_size"], hidden),
        positions=tensor("embeddings.position_embeddings.weight", config["max_position_embeddings"], hidden) + types[0],
        norm=norm("embeddings.LayerNorm"),
        layers=tuple(layer(f"encoder.layer.{number}") for number in range(config["num_hidden_layers"])),
        heads=config["num_attention_heads"],
        epsilon=config["layer_norm_eps"],
        pooling=pooling,
        normalize=normalize,
    )


def erf(x: Float32) -> Float32:
    """The error function by Abramowitz and Stegun 7.1.26, off by less than 2e-7 with float32's rounding.

    `math.erf`, which knows no arrays, took longer than all the rest of a replica's self-test.
    """
    wide = np.abs(x, dtype=np.float64)
    t = 1 / (1 + 0.3275911 * wide)
    series = np.polyval([1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592, 0], t)
    return np.asarray(np.copysign(1 - series * np.exp(-wide * wide), x), np.float32)


def reference(bert: Bert, packed: Packed) -> Float32:
    """The vectors, float32 [B, H], by the definition; slow, for a handful of short texts."""
    ends = np.cumsum(packed.lengths)
    rows = [packed.ids[end - length : end] for end, length in zip(ends, packed.lengths, strict=True)]
    return np.stack([_embed_one(bert, ids) for ids in rows])


def _embed_one(bert: Bert, ids: np.ndarray) -> Float32:
    def dense(x: Float32, d: Dense) -> Float32:
        return np.asarray(x @ d.weight.T + d.bias, np.float32)

    def norm(x: Float32, n: Norm) -> Float32:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        return np.asarray(centred / np.sqrt(variance + bert.epsilon) * n.scale + n.shift, np.float32)

    length, hidden = len(ids), bert.dimensions
    width = hidden // bert.heads
    x = norm(bert.words[ids] + bert.positions[:length], bert.norm)  # [S, H]
    for layer in bert.layers:
        qkv = dense(x, layer.qkv).reshape(length, 3, bert.heads, width).transpose(1, 2, 0, 3)  # [3, A, S, W]
        scores = qkv[0] @ qkv[1].transpose(0, 2, 1) / np.float32(math.sqrt(width))  # [A, S, S]
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = (weights @ qkv[2]).transpose(1, 0, 2).reshape(length, hidden)  # [S, H]
        x = norm(x + dense(mixed, layer.out), layer.out_norm)
        up = dense(x, layer.up)  # [S, I]
        gelu = up * np.float32(0.5) * (1 + erf(up / np.float32(math.sqrt(2))))
        x = norm(x + dense(gelu, layer.down), layer.down_norm)
    vector = x.mean(0) if bert.pooling == "mean" else x[0]
    if bert.normalize:
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return np.asarray(vector, np.float32)
