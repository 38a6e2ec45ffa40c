"""20,000 bodies of `/v1/embeddings` at the real service, and a judge that says what must come back for each.

The judge uses the standard library's JSON and the model's own tokenizer, and nothing of the service. It says of every
body whether it is valid, else which fields are at fault; so a wrong refusal is found as well as a wrong acceptance.
"""

import asyncio
import base64
import json
import math
import multiprocessing
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from tokenizers import Tokenizer

from tests.model import FOLDER, MODEL
from tests.service.conftest import Service

pytestmark = pytest.mark.service

BODIES = 20_000
# Bodies in flight at once, so that answers could get mixed up.
TOGETHER = 16
DIMENSIONS, MAX_TOKENS, VOCABULARY, MAX_INPUTS, MAX_REQUEST_TOKENS = 384, 256, 30_522, 2048, 300_000
START_ID, END_ID = 101, 102
# Texts whose vectors are known before the fuzz, so that a vector in a wrong place is seen.
KNOWN = ("red shoes", "How do I reset my password?", "Der Zug nach Basel fährt um neun.", "42", "\x00", "の", "x" * 300)

Header = tuple[bytes, bytes]


@dataclass(frozen=True)
class Sent:
    """A request as it goes out."""

    body: bytes
    content_type: bytes | None = b"application/json"
    headers: tuple[Header, ...] = ()
    pieces: int | None = None  # chunks of the body; None: one body with a content-length

    def __repr__(self) -> str:
        shown = repr(self.body) if len(self.body) <= 2000 else f"{self.body[:2000]!r}... of {len(self.body)} bytes"
        return f"Sent({shown}, {self.content_type!r}, {self.headers!r}, pieces={self.pieces!r})"


@dataclass
class Verdict:
    """What must come back: 200 if there is no fault, else an error that names one of the faults."""

    faults: set[tuple[int, str | None]] = field(default_factory=set)
    model: str = ""
    texts: list[str] | None = None
    tokens: list[int] = field(default_factory=list)  # of each input, after the cut
    truncated: int = 0
    dimensions: int = DIMENSIONS
    base64: bool = False


class Judge:
    """Reads a request as the README promises, by other means than the service."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def verdict(self, sent: Sent) -> Verdict:
        verdict = Verdict()
        kind = (sent.content_type or b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            verdict.faults = {(415, None)}
            return verdict
        try:
            body = json.loads(
                sent.body.decode(), parse_constant=_not_json, parse_float=_number, parse_int=_whole_number
            )
            json.dumps(body, ensure_ascii=False).encode()  # a lone surrogate fails here
        except (ValueError, RecursionError):
            verdict.faults = {(400, None)}
            return verdict
        if not isinstance(body, dict):
            verdict.faults = {(400, None)}
            return verdict
        self._judge_fields(body, verdict)
        return verdict

    def _judge_fields(self, body: dict[str, Any], verdict: Verdict) -> None:
        verdict.model = body.get("model")
        if type(verdict.model) is not str or not verdict.model:
            verdict.faults.add((400, "model"))
        elif verdict.model != MODEL:
            verdict.faults.add((404, None))
        encoding = body.get("encoding_format")
        if encoding not in (None, "float", "base64"):
            verdict.faults.add((400, "encoding_format"))
        verdict.base64 = encoding == "base64"
        dimensions = body.get("dimensions")
        if dimensions is not None:
            verdict.dimensions = dimensions
            if type(dimensions) is not int or not 1 <= dimensions <= DIMENSIONS:
                verdict.faults.add((400, "dimensions"))
        truncate = body.get("truncate")
        if truncate not in (None, "end", "error"):
            verdict.faults.add((400, "truncate"))
        full = self._full_lengths(body.get("input"), verdict)
        verdict.tokens = [min(length, MAX_TOKENS) for length in full]
        verdict.truncated = sum(length > MAX_TOKENS for length in full)
        if not full or sum(verdict.tokens) > MAX_REQUEST_TOKENS or (verdict.truncated and truncate == "error"):
            verdict.faults.add((400, "input"))

    def _full_lengths(self, value: Any, verdict: Verdict) -> list[int]:
        """Tokens of each input before any cut, with start and end; none where the input can't be embedded."""
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or not value:
            return []
        if all(type(item) is int for item in value):
            value = [value]
        if len(value) > MAX_INPUTS:
            return []
        if all(isinstance(item, str) and item for item in value):
            verdict.texts = value
            return [len(encoding.ids) for encoding in self._tokenizer.encode_batch(value)]
        if not all(isinstance(row, list) and row for row in value):
            return []
        if not all(type(item) is int and 0 <= item < VOCABULARY for row in value for item in row):
            return []
        return [len(row) + (0 if len(row) > 1 and (row[0], row[-1]) == (START_ID, END_ID) else 2) for row in value]


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _number(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise ValueError("out of the range of a double")
    return value


def _whole_number(digits: str) -> float:
    return int(digits) if len(digits) < 20 else _number(digits)


# What is sent. Every strategy is made once, since making one costs Hypothesis more than drawing from it.

_ODD_TEXTS = [*KNOWN, " ", "\t\n", "\ufeff", "\u200b", "\U0010ffff", "\U0001f469\u200d\U0001f680", "ΑΣ", "İ", "ﷺ"]
_ODD_TEXTS += ["e\u0301\u0301", "[CLS] [MASK][SEP]", "\x7f\x80\x9f", "\u2028", "\\ud800", '"}],', "\u202e", "\uffff"]
_PLAIN = st.text(min_size=1, max_size=12)
_TIMES = st.sampled_from([1, 1, 1, 1, 2, 2, 3, 5, 40, 300])
_TEXT = st.one_of(
    _PLAIN,
    st.sampled_from(_ODD_TEXTS),
    st.builds(lambda text, times: (text + " ") * times, _PLAIN, _TIMES),
)
_SOME_IDS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6)
_IDS = st.one_of(
    _SOME_IDS.map(lambda ids: [START_ID, *ids, END_ID]),
    st.builds(lambda ids, times: ids * times, _SOME_IDS, _TIMES),
    st.sampled_from([[START_ID, END_ID], [START_ID], [END_ID, START_ID], [0, VOCABULARY - 1]]),
)
_INPUT = st.one_of(
    _TEXT,
    st.lists(_TEXT, min_size=1, max_size=4),
    _IDS,
    st.lists(_IDS, min_size=1, max_size=4),
    st.builds(lambda item, times: [item] * times, st.one_of(_TEXT, _IDS), st.integers(1, 6)),
)
_LEAF = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 400),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
)
_JSON: SearchStrategy[Any] = st.recursive(
    _LEAF,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_VALID = st.fixed_dictionaries(
    {"model": st.just(MODEL), "input": _INPUT},
    optional={
        "encoding_format": st.sampled_from(["float", "base64", None]),
        "dimensions": st.none() | st.integers(1, DIMENSIONS) | st.sampled_from([1, 2, 383, 384]),
        "truncate": st.sampled_from(["end", "end", None, "error"]),
        "user": st.none() | st.text(max_size=5),
    },
)
_ODD_INPUTS = [None, True, 0, 7, -1, 1.0, 1.5, 2**31, 2**63, 2**64, 2**200, VOCABULARY, -(2**63), "", "a", [], {}, [[]]]
_ODD_WORDS = st.sampled_from(["", "FLOAT", "float ", "base64\x00", "int8", "start", "END", "none", "Float", MODEL])
# For each field, values that are mostly wrong for it.
_SPOILED: dict[str, SearchStrategy[Any]] = {
    "model": _JSON | _ODD_WORDS | st.sampled_from([MODEL + " ", MODEL.upper(), "a" * 5000, "Mihaiii/Ivysaur"]),
    "input": st.one_of(
        _JSON,
        st.sampled_from(_ODD_INPUTS),
        st.lists(st.sampled_from(_ODD_INPUTS), max_size=3),
        st.lists(st.lists(st.sampled_from(_ODD_INPUTS), max_size=3), max_size=3),
        st.lists(_TEXT | st.sampled_from(_ODD_INPUTS), max_size=3),
        st.lists(_IDS | st.sampled_from(_ODD_INPUTS), max_size=3),
    ),
    "encoding_format": _JSON | _ODD_WORDS,
    "dimensions": _JSON | st.sampled_from([0, -1, 385, 1536, 1.0, 384.0, True, "8", 2**31, 2**63, 2**64, 10**300]),
    "truncate": _JSON | _ODD_WORDS,
    "user": _JSON,
}
_NAME = st.sampled_from([*_SPOILED, "input", "input", "input", "dimensions"])
# Written into a body at any place: what JSON, UTF-8 and their readers trip over.
_BREAKS = [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\\ud800", b"\\udfff\\ud800", b"\\ud83d\\ude00", b"\\u0000", b"\x00"]
_BREAKS += [b"NaN", b"Infinity", b"1e999", b"-0", b"01", b"9" * 400, b"9" * 5000, b"//", b"'", b'"', b",", b"]", b"}"]
_BREAK = st.sampled_from(_BREAKS) | st.binary(max_size=3)
_WAYS = ["valid"] * 3 + ["spoiled"] * 6 + ["broken"] * 3 + ["bytes", "json", "twice", "deep", "unknown"]
_WAY = st.sampled_from(_WAYS)
_BYTES = st.binary(max_size=60)
_STYLE, _UP_TO_3, _PLACE = st.integers(0, 2), st.integers(0, 3), st.integers(0, 1000)
_UNKNOWN = st.text(max_size=8)
_DEEP = st.tuples(
    st.sampled_from(["input", "user", "dimensions", "extra"]),
    st.sampled_from([(b"[", b"]"), (b'{"a":', b"}")]),
    st.sampled_from([2, 50, 300, 50_000]),
)
_AROUND = st.sampled_from(["", "", "", "BOM", "NUL", "UTF-16"])


@st.composite
def _body(draw: DrawFn) -> bytes:
    way = draw(_WAY)
    if way == "bytes":
        return draw(_BYTES)
    if way == "json":
        return json.dumps(draw(_JSON)).encode()
    fields = draw(_VALID)
    if way == "unknown":
        fields.setdefault(draw(_UNKNOWN), draw(_JSON))
    if way == "spoiled":
        name = draw(_NAME)
        fields[name] = draw(_SPOILED[name])
    if way == "deep":
        name, (opening, closing), depth = draw(_DEEP)
        fields.pop(name, None)
        return _rendered(fields, 1)[:-1] + b',"%s":%s1%s}' % (name.encode(), opening * depth, closing * depth)
    body = _rendered(fields, draw(_STYLE))
    if way == "twice":  # a field given twice: the last one counts
        name = draw(_NAME)
        value = fields[name] if name in fields and draw(_UP_TO_3) else draw(_SPOILED[name])
        body = body.rstrip()[:-1] + b"," + json.dumps({name: value}).encode()[1:]
    if way == "broken":
        place, removed = draw(_PLACE) % (len(body) + 1), draw(_UP_TO_3)
        body = body[:place] + draw(_BREAK) + body[place + removed :]
        around = draw(_AROUND)
        if around == "BOM":
            body = b"\xef\xbb\xbf" + body
        elif around == "NUL":
            body += b"\x00"
        elif around == "UTF-16":
            body = body.decode("latin-1").encode("utf-16")
    return body


def _rendered(fields: dict[str, Any], style: int) -> bytes:
    """The same object in one of the ways that a client may write it."""
    if style == 1:
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    if style == 2:
        return b" \r\n\t" + json.dumps(dict(reversed(fields.items())), indent=2).encode() + b"\n"
    return json.dumps(fields).encode()


_RIGHT_TYPES = [b"application/json"] * 100
_RIGHT_TYPES += [b"APPLICATION/Json", b"application/json; charset=utf-8", b"application/json;"]
_WRONG_TYPES = [None, b"", b"text/plain", b"application/jsonx", b"application/x-ndjson", b"\xff", b"json", b"a" * 500]
_WRONG_TYPES += [b"multipart/form-data", b"application/x-www-form-urlencoded", b"application/vnd.api+json"]
# Not `expect: 100-continue`: of quick refusals to it HAProxy 2.8 loses one in a hundred (haproxy/haproxy#2587).
_ODD_HEADERS: list[Header] = [
    (b"accept", b"text/html"),
    (b"accept", b""),
    (b"accept-encoding", b"br, gzip;q=0"),
    (b"authorization", b"Bearer \xff"),
    (b"connection", b"close"),
    (b"content-encoding", b"gzip"),
    (b"cookie", b"a=b; \xe4"),
    (b"forwarded", b'for="[::1]"'),
    (b"if-none-match", b"*"),
    (b"origin", b"null"),
    (b"range", b"bytes=0-3"),
    (b"serve-multiplexed-model-id", b"nothing"),
    (b"te", b"trailers"),
    (b"traceparent", b"\xff"),
    (b"upgrade", b"h2c"),
    (b"x-http-method-override", b"DELETE"),
    (b"x-long", b"a" * 4000),  # three of them fit into the 16 KiB that HAProxy takes
    (b"x-request-disconnect-disabled", b"?1"),
    (b"x-request-id", b"given " * 50 + b"."),
    (b"x-request-timeout-seconds", b"nan"),
    (b"x-request-timeout-seconds", b"-1"),
]
_HEADER = st.tuples(
    st.text("abcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+-.^_`|~", max_size=12).map(lambda name: b"x-" + name.encode()),
    st.binary(max_size=20).map(lambda value: bytes(byte for byte in value if byte > 0x20 and byte != 0x7F)),
)
_NO_HEADERS: tuple[Header, ...] = ()
_HEADERS = st.just(_NO_HEADERS) | st.lists(st.sampled_from(_ODD_HEADERS) | _HEADER, max_size=3).map(tuple)
_SENT = st.builds(
    Sent, _body(), st.sampled_from(_RIGHT_TYPES + _WRONG_TYPES), _HEADERS, st.sampled_from([None] * 6 + [1, 20])
)

_ERROR_CODES = {400: None, 404: "model_not_found", 415: "unsupported_content_type"}


async def _answer(http: httpx.AsyncClient, sent: Sent) -> httpx.Response:
    async def pieces(count: int) -> AsyncIterator[bytes]:
        size = max(1, -(-len(sent.body) // count))
        for start in range(0, len(sent.body), size):
            yield sent.body[start : start + size]

    headers = list(sent.headers)
    if sent.content_type is not None:
        headers.append((b"content-type", sent.content_type))
    content = sent.body if sent.pieces is None else pieces(sent.pieces)
    return await http.post("/v1/embeddings", content=content, headers=headers)


def _hold(answer: httpx.Response, verdict: Verdict, known: dict[str, np.ndarray], fingerprint: str) -> None:
    """Raises AssertionError if the answer is not what the judge demands."""
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    if answer.status_code != 200:
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
        error = body["error"]
        assert (answer.status_code, error["param"]) in verdict.faults, f"none of {verdict.faults or 'no faults'}"
        assert isinstance(error["message"], str) and 10 <= len(error["message"]) < 600
        expected = ("invalid_request_error", _ERROR_CODES[answer.status_code])
        if sum(verdict.tokens) > MAX_REQUEST_TOKENS:
            expected = ("max_tokens_per_request", "max_tokens_per_request")
        assert (error["type"], error["code"]) == expected
        return
    assert not verdict.faults, f"accepted in spite of {verdict.faults}"
    assert set(body) == {"object", "data", "model", "usage"}
    assert (body["object"], body["model"]) == ("list", verdict.model)
    assert [item["index"] for item in body["data"]] == list(range(len(verdict.tokens)))
    assert all(item["object"] == "embedding" and len(item) == 3 for item in body["data"])
    assert body["usage"] == dict.fromkeys(("prompt_tokens", "total_tokens"), sum(verdict.tokens))
    assert answer.headers["x-truncated-inputs"] == str(verdict.truncated)
    assert answer.headers["x-model-fingerprint"] == fingerprint
    assert all(isinstance(item["embedding"], str if verdict.base64 else list) for item in body["data"])
    vectors = np.stack([_vector(item["embedding"]) for item in body["data"]])
    assert vectors.shape == (len(verdict.tokens), verdict.dimensions)
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    assert np.abs(norms - 1).max() < 1e-5, f"lengths {norms}"
    if verdict.dimensions == DIMENSIONS:
        for text, vector in zip(verdict.texts or [], vectors, strict=False):
            # bfloat16 rounds differently in another batch; vectors of different texts are far below this.
            assert text not in known or known[text] @ vector > 0.99, f"not the vector of {text!r}"


def _vector(shown: str | list[float]) -> np.ndarray:
    if isinstance(shown, str):
        return np.frombuffer(base64.b64decode(shown, validate=True), "<f4")
    return np.array(shown, np.float32)


async def _embed(http: httpx.AsyncClient, text: str) -> np.ndarray:
    answer = await http.post("/v1/embeddings", json={"model": MODEL, "input": text})
    assert answer.status_code == 200, answer.text
    return _vector(answer.json()["data"][0]["embedding"])


def _generated(count: int) -> list[Sent]:
    """At least so many requests with different bodies as Hypothesis draws them, new ones in every run."""
    drawn = {sent.body: sent for sent in _edges()}
    # Drawing takes long, and of one process only one core. About one in a hundred is drawn by both.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        for part in processes.map(_drawn, [count // 2 + count // 40] * 2):
            drawn |= part
    return list(drawn.values())


def _drawn(count: int) -> dict[bytes, Sent]:
    """At least so many, by their bodies."""
    drawn: dict[bytes, Sent] = {}

    # Of Hypothesis only what generates: nothing can fail here, and bodies are small enough to read without shrinking.
    # With this backend it draws every one anew, where its own makes half of them by copying parts of others.
    @settings(
        max_examples=count // 100,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        derandomize=False,
        backend="hypothesis-urandom",
    )
    @given(st.lists(_SENT, min_size=10, max_size=10))
    def draw(some: list[Sent]) -> None:
        drawn.update((sent.body, sent) for sent in some)

    while len(drawn) < count:
        draw()
    return drawn


def _edges() -> list[Sent]:
    """What is too long to be drawn: requests at the limits on inputs and on tokens."""
    full = [[7] * (MAX_TOKENS - 2)]
    inputs = [["a"] * MAX_INPUTS, ["a"] * (MAX_INPUTS + 1), [[7]] * (MAX_INPUTS + 1), [7] * (MAX_INPUTS + 1)]
    inputs += [full * (MAX_REQUEST_TOKENS // MAX_TOKENS + 1), ["a " * 10_000], ["a" * 1_000_000]]
    return [Sent(_rendered({"model": MODEL, "input": value, "dimensions": 2}, 1)) for value in inputs]


async def test_twenty_thousand_bodies(service: Service) -> None:
    requests, judge = _generated(BODIES), Judge()
    seen, wrong, waiting = Counter[int](), dict[str, str](), iter(requests)

    async def work() -> None:
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as http:
            for sent in waiting:
                came = "no answer"
                try:
                    answer = await _answer(http, sent)
                    came = f"{answer.status_code} {answer.text[:1000]}"
                    seen[answer.status_code] += 1
                    _hold(answer, judge.verdict(sent), known, model["fingerprint"])
                except (AssertionError, KeyError, TypeError, ValueError, httpx.TransportError) as fault:
                    what = f"{type(fault).__name__}: {fault}".partition("\n")[0]
                    shown = f"{what}\n  {sent}\n  -> {came}"
                    wrong[what] = min(wrong.get(what, shown), shown, key=len)

    async with httpx.AsyncClient(base_url=service.url, timeout=60) as http:
        known = {text: await _embed(http, text) for text in KNOWN}
        model = (await http.get(f"/v1/models/{MODEL}")).json()
        assert (model["dimensions"], model["max_tokens"]) == (DIMENSIONS, MAX_TOKENS)
        await asyncio.gather(*(work() for _ in range(TOGETHER)))
        assert not wrong, "\n".join(["of each kind of fault the shortest:", *sorted(wrong.values(), key=len)[:10]])
        for path in ("/healthz", "/readyz"):
            assert (await http.get(path)).status_code == 200
        for text, vector in known.items():
            assert np.array_equal(await _embed(http, text), vector), f"{text!r} has another vector than before"
    assert seen.total() == len({sent.body for sent in requests}) >= BODIES
    # Nor may the mix run dry of valid bodies or of any kind of error.
    assert min(seen[200], seen[400]) > BODIES // 5 and min(seen[404], seen[415]) > BODIES // 200, seen


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"x-request-timeout-seconds", b"\xff"),
        (b"x-request-timeout-seconds", b"0.0000001"),
        (b"x-request-disconnect-disabled", b"\xff"),
        (b"x-request-id", b"\xff"),
        (b"x-session-id", b"\xff"),
        (b"serve-multiplexed-model-id", b"\xff"),
    ],
)
async def test_headers_that_serve_reads_itself_do_no_harm(service: Service, name: bytes, value: bytes) -> None:
    async with httpx.AsyncClient(base_url=service.url) as http:
        body = _rendered({"model": MODEL, "input": "x"}, 0)
        assert (await _answer(http, Sent(body, headers=((name, value),)))).status_code == 200
