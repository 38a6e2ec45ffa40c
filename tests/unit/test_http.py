"""The HTTP face in one process, with stages computed by hand: statuses, headers, error objects, limits, keys, CORS."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from serve_app import keys as key_files
from serve_app.bodies import LARGEST_AT_ONCE, SMALL_BYTES
from serve_app.catalog import Catalog
from serve_app.errors import (
    DeadlineExceeded,
    EmbeddingError,
    EngineError,
    ModelUnavailable,
    Overloaded,
)
from serve_app.http import create_app
from serve_app.keys import Keys
from serve_app.pipeline import Pipeline
from serve_app.scope import canonical, middlewares
from serve_app.settings import ModelSettings, Settings
from tests.hand import HandStages, vector

MODEL = "Mihaiii/Ivysaur"


async def client(
    stages: HandStages, keys: Keys | None = None, shows_faults: bool = False, **settings: object
) -> httpx.AsyncClient:
    app = await application(stages, keys, **settings)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=shows_faults)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def application(stages: HandStages, keys: Keys | None = None, **settings: object) -> ASGIApp:
    """The application as Serve calls it, in front of one model."""
    checked = Settings.model_validate(settings)
    models = Catalog([Pipeline(ModelSettings(), stages, checked.max_request_tokens)])
    if stages.failure is None:
        await models.pipelines[0].discover(time.monotonic() + 60)
    [middleware] = middlewares()
    return middleware.cls(create_app(models, checked, keys))


def error_of(answer: httpx.Response) -> dict[str, str | None]:
    """The error object, after a look that it is OpenAI's: all four fields and nothing else."""
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and isinstance(body["error"]["type"], str)
    assert answer.headers["content-type"] == "application/json"
    return body["error"]


async def test_an_embedding_with_its_headers() -> None:
    async with await client(HandStages()) as http:
        answer = await http.post("/v1/embeddings", json={"model": MODEL, "input": ["one", "x" * 99], "user": "u"})
    assert answer.status_code == 200
    body = answer.json()
    assert np.allclose([item["embedding"] for item in body["data"]], [vector("one"), vector("x" * 99)])
    assert body["model"] == MODEL and body["usage"] == {"prompt_tokens": 21, "total_tokens": 21}
    assert answer.headers["x-truncated-inputs"] == "1"
    assert answer.headers["x-model-fingerprint"] == "f1ve"
    assert int(answer.headers["openai-processing-ms"]) >= 0
    stages = dict(part.strip().split(";dur=") for part in answer.headers["server-timing"].split(","))
    assert set(stages) == {"tokenize", "queue", "infer"} and all(float(ms) >= 0 for ms in stages.values())


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "retry_after"),
    [
        (ModelUnavailable("loading"), 503, "service_unavailable_error", "model_not_ready", "2"),
        (Overloaded("busy", 0.2), 429, "rate_limit_error", "slow_down", "1"),
        (Overloaded("busy", 7.6), 429, "rate_limit_error", "slow_down", "8"),
        (Overloaded("busy", 999), 429, "rate_limit_error", "slow_down", "60"),
        (DeadlineExceeded("late"), 504, "server_error", "deadline_exceeded", None),
        (EngineError("secret detail"), 500, "server_error", None, None),
    ],
)
async def test_faults_behind_the_ingress(
    error: EmbeddingError, status: int, kind: str, code: str | None, retry_after: str | None
) -> None:
    stages = HandStages()
    async with await client(stages) as http:
        stages.failure = error
        answer = await http.post("/v1/embeddings", json={"model": MODEL, "input": "x"})
    assert answer.status_code == status
    shown = error_of(answer)
    assert (shown["type"], shown["code"]) == (kind, code)
    assert answer.headers.get("retry-after") == retry_after
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("POST", "/", 405, "method_not_supported"),
        ("GET", "/v1/embeddings", 405, "method_not_supported"),
        ("DELETE", "/v1/models", 405, "method_not_supported"),
        ("POST", "/healthz", 405, "method_not_supported"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
        ("GET", "/v1/models/no/ne", 404, "model_not_found"),
    ],
)
async def test_wrong_routes_and_methods(method: str, path: str, status: int, code: str) -> None:
    async with await client(HandStages()) as http:
        answer = await http.request(method, path)
    assert answer.status_code == status
    assert error_of(answer)["code"] == code


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
async def test_a_wrong_content_type(kind: str | None) -> None:
    async with await client(HandStages()) as http:
        answer = await http.post("/v1/embeddings", content=b"{}", headers={"content-type": kind} if kind else {})
    assert answer.status_code == 415
    assert error_of(answer)["code"] == "unsupported_content_type"


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
async def test_a_right_content_type(kind: str) -> None:
    body = b'{"model": "Mihaiii/Ivysaur", "input": "x"}'
    async with await client(HandStages()) as http:
        answer = await http.post("/v1/embeddings", content=body, headers={"content-type": kind})
    assert answer.status_code == 200


@pytest.mark.parametrize(("size", "status"), [(2048, 200), (2049, 413)])
@pytest.mark.parametrize("chunked", [False, True])
async def test_the_limit_on_bodies_at_its_edges(size: int, status: int, chunked: bool) -> None:
    body = b'{"model": "Mihaiii/Ivysaur", "input": "x"}'.ljust(size)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, size, 100):
            yield body[start : start + 100]

    async with await client(HandStages(), max_body_bytes=2048) as http:
        answer = await http.post(
            "/v1/embeddings",
            content=chunks() if chunked else body,
            headers={"content-type": "application/json"},
        )
    assert answer.status_code == status
    if status == 413:
        assert "over the limit of 2048 bytes" in str(error_of(answer)["message"])


async def test_a_declared_length_over_the_limit_is_refused_before_the_body_is_read() -> None:
    async def unread() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    async with await client(HandStages(), max_body_bytes=2048) as http:
        headers = {"content-type": "application/json", "content-length": "2049"}
        answer = await http.post("/v1/embeddings", content=unread(), headers=headers)
    assert answer.status_code == 413


async def test_bodies_have_a_limit_together_until_they_are_answered() -> None:
    gate, sent = asyncio.Event(), asyncio.Semaphore(0)

    body = b'{"model": "Mihaiii/Ivysaur", "input": "x"}'

    async def slow() -> AsyncIterator[bytes]:
        yield body.ljust(limit - 1)
        sent.release()
        await gate.wait()
        yield b" "

    json = {"content-type": "application/json"}
    limit = 2 * SMALL_BYTES
    async with await client(HandStages(), max_body_bytes=limit) as http:
        asking = [
            asyncio.create_task(http.post("/v1/embeddings", content=slow(), headers=json))
            for _ in range(LARGEST_AT_ONCE)
        ]
        for _ in asking:
            await sent.acquire()
        refused = await http.post("/v1/embeddings", content=body.ljust(SMALL_BYTES + 1), headers=json)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "5"
        assert f"the limit is {limit * LARGEST_AT_ONCE}" in str(error_of(refused)["message"])
        small = await http.post("/v1/embeddings", content=body.ljust(SMALL_BYTES), headers=json)
        assert small.status_code == 200
        gate.set()
        assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200] * LARGEST_AT_ONCE
        after = await http.post("/v1/embeddings", content=body.ljust(limit), headers=json)
        assert after.status_code == 200


async def test_more_dimensions_than_there_are_are_refused_before_any_work() -> None:
    stages = HandStages()
    async with await client(stages) as http:
        answer = await http.post("/v1/embeddings", json={"model": MODEL, "input": "x", "dimensions": 5})
    assert answer.status_code == 400 and error_of(answer)["param"] == "dimensions"
    assert stages.tokens_by_call == []


async def test_models_are_described_under_names_with_a_slash_plain_and_escaped() -> None:
    async with await client(HandStages()) as http:
        listed = (await http.get("/v1/models")).json()
        assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == [MODEL]
        for path in ("/v1/models/Mihaiii/Ivysaur", "/v1/models/Mihaiii%2FIvysaur", "/models/Mihaiii/Ivysaur"):
            model = (await http.get(path)).json()
            assert model == listed["data"][0]
    assert (model["object"], model["owned_by"], model["fingerprint"]) == ("model", "Mihaiii", "f1ve")


async def test_a_new_ingress_lists_its_models_once_it_has_heard_of_them() -> None:
    models = Catalog([Pipeline(ModelSettings(), HandStages(), 1000)])
    transport = httpx.ASGITransport(app=create_app(models, Settings(), None))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        listing = asyncio.create_task(http.get("/v1/models"))
        await asyncio.sleep(0.01)
        assert not listing.done()
        await models.pipelines[0].discover(time.monotonic() + 60)
        assert [model["id"] for model in (await listing).json()["data"]] == [MODEL]


@pytest.mark.parametrize(
    "path", ["/embeddings", "//v1/embeddings", "/v1/embeddings/", "/v1/v1/embeddings", "/v1//embeddings"]
)
async def test_what_users_type_as_a_base_url_is_forgiven(path: str) -> None:
    async with await client(HandStages()) as http:
        answer = await http.post(f"http://test{path}", json={"model": MODEL, "input": "x"})
    assert answer.status_code == 200


@pytest.mark.parametrize(("path", "expected"), [("/", "/"), ("//", "/"), ("/v1/", "/v1"), ("/v1/v1", "/v1/v1")])
def test_paths_are_canonical(path: str, expected: str) -> None:
    assert canonical(path) == expected


async def test_health_needs_no_model_and_readiness_runs_one() -> None:
    stages = HandStages()
    stages.failure = ModelUnavailable("still loading")
    async with await client(stages) as http:
        assert (await http.get("/healthz")).json() == {"status": "ok"}
        answer = await http.get("/readyz")
        assert answer.status_code == 503
        assert answer.json() == {"status": "not ready", "models": {MODEL: "still loading"}}
        stages.failure = None
        answer = await http.get("/readyz")
        assert answer.status_code == 200 and answer.json() == {"status": "ready", "models": {MODEL: "ready"}}
    assert stages.tokens_by_call, "readiness must run the path"


async def test_asking_whether_it_is_ready_does_not_wake_a_model_at_zero() -> None:
    stages = HandStages()
    stages.models = 0
    async with await client(stages) as http:
        answer = await http.get("/readyz")
        assert answer.status_code == 200 and answer.json() == {"status": "ready", "models": {MODEL: "asleep"}}
        assert stages.tokens_by_call == []
        stages.models = 1
        assert (await http.post("/v1/embeddings", json={"model": MODEL, "input": "x"})).status_code == 200


async def test_a_request_over_its_time_is_given_up() -> None:
    class Stuck(HandStages):
        async def infer(self, packed: object, deadline: float, is_bulk: bool = False) -> object:
            return await asyncio.get_running_loop().create_future()

    async with await client(Stuck(), request_timeout_s=0.05) as http:  # type: ignore[arg-type]
        answer = await http.post("/v1/embeddings", json={"model": MODEL, "input": "x"})
    assert answer.status_code == 504
    assert error_of(answer)["message"] == "No answer within the limit of 0.05 s."
    async with await client(Stuck()) as http:  # type: ignore[arg-type]
        asked = {"model": MODEL, "input": "x"}
        answer = await http.post("/v1/embeddings", json=asked, headers={"x-deadline-ms": "50"})
        assert answer.status_code == 504
        assert error_of(answer)["message"] == "No answer within the limit of 0.05 s."
        for value in ("0", "-5", "1.5", "soon", "\u0663"):
            answer = await http.post("/v1/embeddings", json=asked, headers={"x-deadline-ms": value.encode()})
            assert answer.status_code == 400 and "'x-deadline-ms' must be a whole number" in error_of(answer)["message"]


async def test_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.txt"
    key = key_files.add(file, "team-a")
    asked = {"model": MODEL, "input": "x"}
    async with await client(HandStages(), Keys(file)) as http:
        for header, status, code in (
            (None, 401, None),
            ("Bearer ", 401, None),
            (key, 401, None),
            (f"Basic {key}", 401, None),
            (f"Bearer {key}x", 401, "invalid_api_key"),
            (f"Bearer {key}", 200, None),
            (f"bearer  {key}", 200, None),
        ):
            headers = {"authorization": header} if header else {}
            answer = await http.post("/v1/embeddings", json=asked, headers=headers)
            assert answer.status_code == status, header
            if status == 401:
                assert error_of(answer)["code"] == code
                assert answer.headers["www-authenticate"] == "Bearer"
                assert key not in answer.text
            assert (await http.get("/v1/models", headers=headers)).status_code == status
            assert (await http.get(f"/v1/models/{MODEL}", headers=headers)).status_code == status
        assert (await http.get("/healthz")).status_code == (await http.get("/readyz")).status_code == 200
    assert key not in caplog.text
    refused = [record.message for record in caplog.records if "refused a key" in record.message]
    assert refused and hashlib.sha256(f"{key}x".encode()).hexdigest()[:12] in refused[-1]


async def test_a_browser_may_call_from_the_origins_of_the_settings() -> None:
    asks = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    async with await client(HandStages(), cors_origins=["https://app.example.com"]) as http:
        allowed = await http.options("/v1/embeddings", headers={"origin": "https://app.example.com"} | asks)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://app.example.com"
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        refused = await http.options("/v1/embeddings", headers={"origin": "https://evil.example.com"} | asks)
        assert "access-control-allow-origin" not in refused.headers
        answer = await http.post(
            "/v1/embeddings", json={"model": MODEL, "input": "x"}, headers={"origin": "https://app.example.com"}
        )
        assert "x-model-fingerprint" in answer.headers["access-control-expose-headers"]
        wrong = await http.post("/v1/embeddings", json={}, headers={"origin": "https://app.example.com"})
        assert wrong.status_code == 400  # which the page may read
        assert wrong.headers["access-control-allow-origin"] == "https://app.example.com"
        foreign = await http.post("/v1/embeddings", json={}, headers={"origin": "https://evil.example.com"})
        assert "access-control-allow-origin" not in foreign.headers


async def test_a_fault_reaches_the_log_and_the_client_only_learns_that_there_was_one() -> None:
    stages, asked = HandStages(), {"model": MODEL, "input": "x"}
    async with await client(stages) as http, await client(stages, shows_faults=True) as server:
        stages.failure = ValueError("somebody's text")
        answer = await http.post("/v1/embeddings", json=asked)
        with pytest.raises(ValueError, match="somebody"):  # the server above gets the exception, for its log
            await server.post("/v1/embeddings", json=asked)
    assert answer.status_code == 500 and error_of(answer)["type"] == "server_error"
    assert "somebody" not in answer.text


@asynccontextmanager
async def served(app: ASGIApp, parser: str) -> AsyncIterator[int]:
    """uvicorn, with one of its two parsers, on this port of loopback."""
    config = uvicorn.Config(app, http=parser, lifespan="off", log_level="critical")
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: config.http_protocol_class(config, state, {}), "127.0.0.1", 0
    )
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize("parser", ["httptools", "h11"])
async def test_an_answer_leaves_in_one_write(parser: str) -> None:
    """HAProxy asks another replica in place of one that was killed, but not once a header has come."""
    writes: list[bytes] = []

    class Watched:
        def __init__(self, transport: asyncio.Transport) -> None:
            self.close, self.is_closing, self._transport = transport.close, transport.is_closing, transport

        def write(self, data: bytes) -> None:
            if data:  # h11's end of a message is empty
                writes.append(data)
            self._transport.write(data)

    app = await application(HandStages())

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        connection = receive.__self__
        connection.transport = Watched(connection.transport)
        await app(scope, receive, send)

    asked = {"model": MODEL, "input": "x"}
    async with (
        served(watched, parser) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as http,
    ):
        statuses = [
            (await http.post("/v1/embeddings", json=asked)).status_code,
            (await http.post("/v1/embeddings", json=asked, headers={"connection": "close"})).status_code,
            (await http.post("/v1/embeddings", json={})).status_code,
            (await http.head("/healthz")).status_code,
            (await http.get("/healthz")).status_code,
        ]
    assert statuses == [200, 200, 400, 405, 200]
    assert len(writes) == len(statuses) and all(each.startswith(b"HTTP/1.1 ") for each in writes)
    assert [each.partition(b"\r\n\r\n")[2][:1] for each in writes] == [b"{", b"{", b"{", b"", b"{"]


async def test_an_answer_leaves_before_what_came_behind_its_request_is_refused() -> None:
    async with served(await application(HandStages()), "h11") as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: test\r\n\r\nno request\r\n\r\n")
        async with asyncio.timeout(10):
            answers = await reader.read()
        writer.close()
    assert answers.startswith(b"HTTP/1.1 200 ") and b"HTTP/1.1 400 " in answers


async def test_the_docs_need_nothing_from_the_internet() -> None:
    async with await client(HandStages()) as http:
        page = (await http.get("/docs")).text
        document = (await http.get("/openapi.json")).json()
        assert (await http.get("/swagger/swagger-ui-bundle.js")).status_code == 200
        assert (await http.get("/")).headers["location"].endswith("/docs")
    assert "https://" not in page
    assert set(document["paths"]) == {"/v1/embeddings", "/v1/models", "/v1/models/{id}", "/healthz", "/readyz"}


async def test_the_examples_in_the_docs_run() -> None:
    async with await client(HandStages()) as http:
        document = (await http.get("/openapi.json")).json()
        content = document["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]
        for example in content["examples"].values():
            assert (await http.post("/v1/embeddings", json=example["value"])).status_code == 200
