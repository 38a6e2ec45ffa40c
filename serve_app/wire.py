"""OpenAI's embeddings request and response: bytes are parsed once and rendered once.

Source: https://github.com/openai/openai-openapi (openapi.yaml 2.3.0, CreateEmbeddingRequest and -Response). As every
client counts on: `encoding_format: null` is as good as absent, and unknown fields are ignored.
"""

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import orjson

from serve_app.errors import InvalidInput, TooManyTokens
from serve_app.packing import ClientIds, Float32


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """A request whose every field has the right type and range; only the model's own limits are still to be held."""

    model: str
    inputs: Sequence[str] | ClientIds
    encoding: Literal["float", "base64"]
    dimensions: int | None
    refuse_truncation: bool


def parse(body: bytes, max_inputs: int, max_tokens: int) -> EmbeddingRequest:
    """Read a request body; raises InvalidInput that names the field, the limit and the value.

    `max_tokens`: that may be sent as ids, before any of them are looked at or cut.
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"The body is not valid JSON in UTF-8: {error.msg} at character {error.pos}.") from None
    if not isinstance(fields, dict):
        raise InvalidInput(f"The body must be a JSON object, not {_kind(fields)}.")
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidInput(f"'model' must be the name of a model, not {_kind(model)}.", "model")
    encoding = fields.get("encoding_format")
    if encoding not in (None, "float", "base64"):
        shown = repr(encoding[:40]) if isinstance(encoding, str) else _kind(encoding)
        raise InvalidInput(f"'encoding_format' must be 'float' or 'base64', not {shown}.", "encoding_format")
    dimensions = fields.get("dimensions")
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        shown = str(dimensions) if type(dimensions) is int else _kind(dimensions)
        raise InvalidInput(f"'dimensions' must be a whole number of at least 1, not {shown}.", "dimensions")
    truncate = fields.get("truncate")
    if truncate not in (None, "end", "error"):
        shown = repr(truncate[:40]) if isinstance(truncate, str) else _kind(truncate)
        raise InvalidInput(f"'truncate' must be 'end' or 'error', not {shown}.", "truncate")
    return EmbeddingRequest(
        model=model,
        inputs=_inputs(fields.get("input"), max_inputs, max_tokens),
        encoding=encoding or "float",
        dimensions=dimensions,
        refuse_truncation=truncate == "error",
    )


def parse_deadline(value: str | None) -> float:
    """Seconds from a header's milliseconds, endless without one; raises InvalidInput for what is no time."""
    if value is None:
        return math.inf
    if not (value.isascii() and value.isdecimal() and int(value[:20]) > 0):
        raise InvalidInput(f"'x-deadline-ms' must be a whole number of at least 1, not {value[:40]!r}.")
    return int(value[:20]) / 1e3


def _inputs(value: Any, max_inputs: int, max_tokens: int) -> Sequence[str] | ClientIds:
    if isinstance(value, str):
        return _texts([value])
    if not isinstance(value, list):
        raise InvalidInput(f"'input' must be a string or an array, not {_kind(value)}.", "input")
    if not value:
        raise InvalidInput("'input' is an empty array; it must hold at least 1 input.", "input")
    kinds = set(map(type, value))  # exact types: a bool is an int to isinstance
    if kinds == {int}:
        return _ids([value], max_tokens)
    if len(value) > max_inputs:
        raise InvalidInput(
            f"'input' holds {len(value)} inputs; at most {max_inputs} are allowed in a request.", "input"
        )
    if kinds == {str}:
        return _texts(value)
    if kinds == {list}:
        return _ids(value, max_tokens)
    named = " and ".join(sorted(_kind(item) for item in {type(item): item for item in value}.values()))
    raise InvalidInput(
        f"'input' must hold only strings, only token ids or only arrays of them; it holds {named}.", "input"
    )


def _texts(texts: list[str]) -> list[str]:
    if "" in texts:
        raise InvalidInput(
            f"Input {texts.index('')} is an empty string; every text needs at least 1 character.", "input"
        )
    return texts


def _ids(rows: list[list[int]], max_tokens: int) -> ClientIds:
    if (tokens := sum(map(len, rows))) > max_tokens:
        raise TooManyTokens(tokens, max_tokens)
    if [] in rows:
        raise InvalidInput(f"Input {rows.index([])} is an empty array; it must hold at least 1 token id.", "input")
    wrong = [item for item in chain.from_iterable(rows) if type(item) is not int]
    if wrong:
        raise InvalidInput(f"An array of token ids must hold only whole numbers; one holds {_kind(wrong[0])}.", "input")
    lengths = np.fromiter(map(len, rows), np.int32, len(rows))
    try:
        return ClientIds(np.fromiter(chain.from_iterable(rows), np.int64, tokens), lengths)
    except OverflowError:
        largest = max(chain.from_iterable(rows))
        raise InvalidInput(f"Token id {largest} is not in any vocabulary.", "input") from None


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words; never the value itself, which may be somebody's text."""
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a non-integer number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return "null" if value is None else names[type(value)]


def check_dimensions(dimensions: int | None, most: int) -> None:
    """Raises InvalidInput if more are asked for than the model has."""
    if dimensions is not None and dimensions > most:
        raise InvalidInput(f"'dimensions' is {dimensions}; this model has {most}.", "dimensions")


def cut(vectors: Float32, dimensions: int | None, normalize: bool) -> Float32:
    """Keep the first `dimensions` of each vector and, as OpenAI does, scale what is left to length 1 again.

    vectors float32 [B, D] -> [B, dimensions], of which there are no more than D.
    """
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    kept = vectors[:, :dimensions]
    if normalize:
        kept = kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-12)
    return np.ascontiguousarray(kept, np.float32)


def render(vectors: Float32, model: str, tokens: int, encoding: Literal["float", "base64"]) -> bytes:
    """The response body: data in input order, base64 of little-endian float32 as OpenAI's clients read it."""
    rows: Iterable[Any]
    if encoding == "base64":
        little = vectors.astype("<f4", copy=False)
        rows = (base64.b64encode(row.tobytes()).decode("ascii") for row in little)
    else:
        rows = vectors
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return orjson.dumps(
        {"object": "list", "data": data, "model": model, "usage": usage}, option=orjson.OPT_SERIALIZE_NUMPY
    )


def render_error(message: str, kind: str, param: str | None, code: str | None) -> bytes:
    """OpenAI's error object: all four fields, always."""
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})
