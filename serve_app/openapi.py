"""The OpenAPI description of the routes: what `/docs` shows and what client generators read.

Written out rather than derived from classes, since the hot route parses its body itself (`wire.py`); a test sends what
this schema allows and forbids to the running service.
"""

from typing import Any

EXAMPLE_MODEL = "Mihaiii/Ivysaur"

_TOKEN_ID = {"type": "integer", "minimum": 0}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer", "description": "Unix time in seconds"},
        "owned_by": {"type": "string"},
        "origin": {"type": "string", "description": "where the weights came from"},
        "engine": {"type": "string"},
        "precision": {"type": "string"},
        "device": {"type": "string"},
        "dimensions": {"type": "integer"},
        "max_tokens": {"type": "integer"},
        "fingerprint": {"type": "string", "description": "of weights, tokenizer, engine and precision"},
    },
}


def _json(schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _errors(*statuses: int) -> dict[str, Any]:
    reasons = {
        400: "The request can't be embedded as it stands; the message names the limit and the value.",
        401: "A key is needed.",
        404: "No such model or route.",
        413: "The body is too large.",
        415: "The body is not declared as JSON.",
        429: "Overloaded: come back after Retry-After seconds.",
        503: "The model is not ready.",
        504: "No answer within the time limit.",
    }
    return {str(status): _json(_ERROR, reasons[status]) for status in statuses}


def embeddings(max_inputs: int) -> dict[str, Any]:
    """`POST /v1/embeddings`."""
    inputs = {
        "oneOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "minItems": 1, "maxItems": max_inputs, "items": {"type": "string", "minLength": 1}},
            {"type": "array", "minItems": 1, "items": _TOKEN_ID},
            {
                "type": "array",
                "minItems": 1,
                "maxItems": max_inputs,
                "items": {"type": "array", "minItems": 1, "items": _TOKEN_ID},
            },
        ],
        "description": "A text, a list of texts, token ids, or a list of them, with or without start and end tokens.",
    }
    body = {
        "type": "object",
        "required": ["model", "input"],
        "properties": {
            "model": {"type": "string", "minLength": 1},
            "input": inputs,
            "encoding_format": {"enum": ["float", "base64", None], "default": "float"},
            "dimensions": {
                "type": ["integer", "null"],
                "minimum": 1,
                "description": "Cut vectors to this many dimensions and scale them to length 1 again.",
            },
            "user": {"type": ["string", "null"], "description": "Accepted and not used."},
            "truncate": {
                "enum": ["end", "error", None],
                "default": "end",
                "description": "What to do with a text over the model's limit: cut its end, or refuse the request.",
            },
        },
        "additionalProperties": True,
    }
    examples = {
        "one text": {"value": {"model": EXAMPLE_MODEL, "input": "How do I reset my password?"}},
        "two texts, base64": {
            "value": {
                "model": EXAMPLE_MODEL,
                "input": ["red shoes", "crimson sneakers"],
                "encoding_format": "base64",
            }
        },
    }
    vector = {"oneOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string", "format": "byte"}]}
    answer = {
        "type": "object",
        "required": ["object", "data", "model", "usage"],
        "properties": {
            "object": {"const": "list"},
            "data": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["object", "index", "embedding"],
                    "properties": {
                        "object": {"const": "embedding"},
                        "index": {"type": "integer"},
                        "embedding": vector,
                    },
                },
            },
            "model": {"type": "string"},
            "usage": {
                "type": "object",
                "required": ["prompt_tokens", "total_tokens"],
                "properties": {"prompt_tokens": {"type": "integer"}, "total_tokens": {"type": "integer"}},
            },
        },
    }
    headers = {
        "x-truncated-inputs": {"schema": {"type": "integer"}, "description": "how many inputs were cut"},
        "x-model-fingerprint": {"schema": {"type": "string"}, "description": "equal where vectors are comparable"},
        "openai-processing-ms": {"schema": {"type": "integer"}},
        "server-timing": {"schema": {"type": "string"}, "description": "milliseconds of each stage"},
    }
    return {
        "summary": "Embed texts",
        "requestBody": {"required": True, "content": {"application/json": {"schema": body, "examples": examples}}},
        "responses": {
            "200": _json(answer, "One vector an input, in their order.") | {"headers": headers},
            **_errors(400, 401, 404, 413, 415, 429, 503, 504),
        },
    }


def models() -> dict[str, Any]:
    """`GET /v1/models`."""
    listed = {
        "type": "object",
        "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}},
    }
    return {
        "summary": "List the models that are served now",
        "responses": {"200": _json(listed, "The models."), **_errors(401)},
    }


def model() -> dict[str, Any]:
    """`GET /v1/models/{id}`."""
    return {
        "summary": "Describe a model",
        "parameters": [
            {
                "name": "id",
                "in": "path",
                "required": True,
                "description": "the model's name; a slash in it may be sent as it is or as %2F",
                "schema": {"type": "string", "minLength": 1},
                "example": EXAMPLE_MODEL,
            }
        ],
        "responses": {"200": _json(_MODEL, "The model."), **_errors(401, 404, 503)},
    }


def probe(summary: str, *, can_fail: bool) -> dict[str, Any]:
    """`GET /healthz` and `GET /readyz`."""
    schema = {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}}
    responses = {"200": _json(schema, "Yes.")} | ({"503": _json(schema, "Not now.")} if can_fail else {})
    return {"summary": summary, "responses": responses}
