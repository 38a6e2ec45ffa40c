"""OpenAI's schema, field by field: what is taken, what is refused and with which words, and exact answers."""

import base64
import json

import numpy as np
import orjson
import pytest
from openai.types import CreateEmbeddingResponse

from serve_app import wire
from serve_app.errors import InvalidInput, TooManyTokens
from serve_app.packing import ClientIds

MANY = 2048


def parse(max_inputs: int = MANY, max_tokens: int = 10_000, **fields: object) -> wire.EmbeddingRequest:
    return wire.parse(json.dumps({"model": "m", "input": "text", **fields}).encode(), max_inputs, max_tokens)


@pytest.mark.parametrize(
    ("sent", "inputs"),
    [
        ("text", ["text"]),
        (" ", [" "]),
        ("\x00", ["\x00"]),
        ("\U0001f600", ["\U0001f600"]),
        (["a"], ["a"]),
        (["a", "b"], ["a", "b"]),
    ],
)
def test_texts(sent: object, inputs: list[str]) -> None:
    assert parse(input=sent).inputs == inputs


@pytest.mark.parametrize(
    ("sent", "ids", "lengths"),
    [
        ([7], [7], [1]),
        ([1, 2, 3], [1, 2, 3], [3]),
        ([[1, 2], [3]], [1, 2, 3], [2, 1]),
        ([2**63 - 1, -5], [2**63 - 1, -5], [2]),
    ],
)
def test_token_ids(sent: object, ids: list[int], lengths: list[int]) -> None:
    inputs = parse(input=sent).inputs
    assert isinstance(inputs, ClientIds)
    assert inputs.ids.tolist() == ids and inputs.lengths.tolist() == lengths


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (None, "must be a string or an array, not null"),
        (5, "not a number"),
        (True, "not a boolean"),
        ({"a": 1}, "not an object"),
        ("", "Input 0 is an empty string"),
        ([], "empty array; it must hold at least 1"),
        (["a", ""], "Input 1 is an empty string"),
        (["a", 1], "it holds a number and a string"),
        (["a", None], "it holds a string and null"),
        ([True, 1], "it holds a boolean and a number"),
        ([True], "it holds a boolean"),
        ([1.5], "it holds a non-integer number"),
        ([1e300], "it holds a non-integer number"),
        ([[]], "Input 0 is an empty array"),
        ([[1], []], "Input 1 is an empty array"),
        ([[1], ["a"]], "only whole numbers; one holds a string"),
        ([[True]], "only whole numbers; one holds a boolean"),
        ([[None]], "only whole numbers; one holds null"),
        ([[1.0]], "only whole numbers; one holds a non-integer number"),
        ([[[1]]], "only whole numbers; one holds an array"),
        ([[1], 2], "it holds a number and an array"),
        ([2**63], "Token id 9223372036854775808 is not in any vocabulary"),
        ([[1], [2**64 - 1]], "Token id 18446744073709551615 is not"),
        ([2**64], "it holds a non-integer number"),
    ],
)
def test_inputs_that_are_refused(sent: object, message: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse(input=sent)
    assert message in str(refused.value)
    assert refused.value.param == "input"


@pytest.mark.parametrize("item", ["a", [1]])
def test_the_limit_on_inputs_at_its_edges(item: object) -> None:
    assert parse(input=[item] * 3, max_inputs=3)
    with pytest.raises(InvalidInput, match="holds 4 inputs; at most 3"):
        parse(input=[item] * 4, max_inputs=3)


@pytest.mark.parametrize("rows", [[1] * 30, [[1] * 10] * 3])
def test_the_limit_on_token_ids_at_its_edges(rows: object) -> None:
    assert parse(input=rows, max_tokens=30)
    with pytest.raises(TooManyTokens, match="Requested 30 tokens, max 29 tokens per request") as refused:
        parse(input=rows, max_tokens=29)
    assert refused.value.param == "input"


def test_one_array_of_many_token_ids_is_one_input() -> None:
    assert parse(input=[1] * 3000, max_inputs=1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", None, "'model' must be the name of a model, not null"),
        ("model", "", "'model' must be"),
        ("model", 3, "not a number"),
        ("encoding_format", "md5", "'float' or 'base64', not 'md5'"),
        ("encoding_format", ["float"], "not an array"),
        ("dimensions", 0, "at least 1, not 0"),
        ("dimensions", -1, "at least 1, not -1"),
        ("dimensions", True, "not a boolean"),
        ("dimensions", 8.0, "not a non-integer number"),
        ("dimensions", "8", "not a string"),
        ("truncate", "start", "'end' or 'error', not 'start'"),
        ("truncate", {}, "not an object"),
    ],
)
def test_fields_that_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse(**{field: value})
    assert message in str(refused.value)
    assert refused.value.param == field


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"model": "m", "input": "\xff"}', "not valid JSON in UTF-8"),
        (b'{"model": "m", "input": "\\ud800"}', "not valid JSON"),
        (b'{"model": "m", "input": NaN}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[" * 500 + b"]" * 500, "must be a JSON object, not an array"),
        (b"null", "must be a JSON object, not null"),
        (b'"text"', "must be a JSON object, not a string"),
    ],
)
def test_bodies_that_are_refused(body: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        wire.parse(body, MANY, MANY)


def test_null_is_as_good_as_absent_and_unknown_fields_are_ignored() -> None:
    sent = parse(encoding_format=None, dimensions=None, user=None, truncate=None, input_type="query", extra={"a": []})
    assert (sent.encoding, sent.dimensions, sent.refuse_truncation) == ("float", None, False)
    assert parse(truncate="error").refuse_truncation


VECTORS = np.array([[0.6, -0.8, 0.0], [1 / 3, 2 / 3, 2 / 3]], np.float32)


def test_floats_are_rendered_so_that_float32_is_read_back_exactly() -> None:
    answer = json.loads(wire.render(VECTORS, "m", 7, "float"))
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert (answer["object"], answer["model"]) == ("list", "m")
    assert [item["index"] for item in answer["data"]] == [0, 1]
    assert all(item["object"] == "embedding" for item in answer["data"])
    assert np.array_equal(np.array([item["embedding"] for item in answer["data"]], np.float32), VECTORS)


def test_base64_is_little_endian_float32() -> None:
    answer = json.loads(wire.render(VECTORS, "m", 7, "base64"))
    rows = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in answer["data"]]
    assert np.array_equal(rows, VECTORS)


def test_the_official_types_read_the_answer() -> None:
    read = CreateEmbeddingResponse.model_validate_json(wire.render(VECTORS, "m", 7, "float"))
    assert read.data[1].index == 1


@pytest.mark.parametrize("dimensions", [1, 2, 3, None])
def test_cut_keeps_the_first_dimensions_at_length_one(dimensions: int | None) -> None:
    short = wire.cut(VECTORS, dimensions, normalize=True)
    assert short.shape == (2, dimensions or 3) and short.dtype == np.float32
    assert np.allclose(np.linalg.norm(short, axis=1), 1)
    assert np.allclose(short[1], VECTORS[1, :dimensions] / np.linalg.norm(VECTORS[1, :dimensions]))


def test_cut_leaves_lengths_alone_where_vectors_are_not_normalised() -> None:
    assert wire.cut(VECTORS, 2, normalize=False).tolist() == VECTORS[:, :2].tolist()


@pytest.mark.parametrize("dimensions", [None, 1, 3])
def test_so_many_dimensions_can_be_had(dimensions: int | None) -> None:
    wire.check_dimensions(dimensions, 3)


def test_more_dimensions_than_there_are_are_refused() -> None:
    with pytest.raises(InvalidInput, match="'dimensions' is 4; this model has 3") as refused:
        wire.check_dimensions(4, 3)
    assert refused.value.param == "dimensions"


def test_a_zero_vector_is_cut_without_a_division_by_zero() -> None:
    assert not np.isnan(wire.cut(np.zeros((1, 3), np.float32), 2, normalize=True)).any()


def test_errors_have_all_four_fields() -> None:
    assert orjson.loads(wire.render_error("no", "kind", None, None)) == {
        "error": {"message": "no", "type": "kind", "param": None, "code": None}
    }
