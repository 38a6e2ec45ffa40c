"""The HTTP face: routes, keys, limits on bodies, and the one table from error class to OpenAI's error object.

It receives the models as a `Catalog` of pipelines and knows nothing of Ray.
"""

import asyncio
import logging
import math
import string
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import orjson
import yaml
from fastapi import FastAPI, Request, Response
from fastapi_swagger import patch_fastapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import request_response
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app import wire
from serve_app.answers import Served
from serve_app.bodies import Bodies, Body
from serve_app.catalog import Catalog
from serve_app.errors import (
    CallerGone,
    DeadlineExceeded,
    EmbeddingError,
    InvalidInput,
    ModelNotFound,
    ModelUnavailable,
    Overloaded,
    TooManyTokens,
    Unauthenticated,
)
from serve_app.keys import Keys
from serve_app.pipeline import Pipeline
from serve_app.scope import is_gone
from serve_app.settings import Settings

logger = logging.getLogger("ray.serve")

# Error class -> (status, OpenAI's type, OpenAI's code); the nearest base class counts. Statuses and words are those
# that OpenAI itself sends, as recorded from real answers, since clients decide by them whether to retry.
ERRORS: Mapping[type[EmbeddingError], tuple[int, str, str | None]] = {
    EmbeddingError: (500, "server_error", None),
    InvalidInput: (400, "invalid_request_error", None),
    TooManyTokens: (400, "max_tokens_per_request", "max_tokens_per_request"),
    Unauthenticated: (401, "invalid_request_error", None),
    ModelNotFound: (404, "invalid_request_error", "model_not_found"),
    ModelUnavailable: (503, "service_unavailable_error", "model_not_ready"),
    Overloaded: (429, "rate_limit_error", "slow_down"),
    DeadlineExceeded: (504, "server_error", "deadline_exceeded"),
    CallerGone: (499, "client_error", "client_closed_request"),  # nobody reads it
}
DEADLINE_HEADER = "x-deadline-ms"  # in how long a client wants its answer, or none
LOADING_RETRY_AFTER_S = 2  # after which a client should ask again for a model that is loading
READY_TIMEOUT_S = 5.0  # that `/readyz` gives one short text to come back, and a model to say what it serves


def create_app(catalog: Catalog, settings: Settings, keys: Keys | None) -> ASGIApp:
    """The ASGI application in front of the catalog's models; open to all where `keys` is None."""
    handlers: dict[Any, Any] = {
        EmbeddingError: _on_embedding_error,
        HTTPException: _on_http_error,
        ClientDisconnect: _on_disconnect,
        Exception: _on_fault,
    }

    bodies = Bodies(settings.max_body_bytes)

    async def embeddings(request: Request) -> Response:
        arrived = time.monotonic()
        _authenticate(request, keys)
        limit_s = min(settings.request_timeout_s, wire.parse_deadline(request.headers.get(DEADLINE_HEADER)))
        try:
            async with asyncio.timeout(limit_s):  # of a client that sends slowly, too
                with Body(bodies) as sent:
                    asked = wire.parse(await sent.read(request), settings.max_inputs, settings.max_request_tokens)
                    pipeline, served = await catalog.find(asked.model, arrived + limit_s)
                    wire.check_dimensions(asked.dimensions, served.dimensions)
                    answer = await pipeline.embed(asked.inputs, arrived + limit_s, asked.refuse_truncation, is_gone())
        except TimeoutError:
            raise DeadlineExceeded(f"No answer within the limit of {limit_s:g} s.") from None
        vectors = wire.cut(answer.vectors, asked.dimensions, served.normalize)
        body = wire.render(vectors, asked.model, answer.tokens, asked.encoding)
        headers = {
            "openai-processing-ms": str(round((time.monotonic() - arrived) * 1e3)),
            "server-timing": f"tokenize;dur={answer.tokenize_ms:.2f}, queue;dur={answer.queue_ms:.2f}, "
            f"infer;dur={answer.infer_ms:.2f}",
            "x-model-fingerprint": answer.fingerprint,
            "x-truncated-inputs": str(answer.truncated),
        }
        return Response(body, media_type="application/json", headers=headers)

    app = _App(
        embeddings,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
        exception_handlers=handlers,
    )
    app.openapi = lambda: _document(catalog, settings)  # type: ignore[method-assign]  # as FastAPI's manual has it

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        _authenticate(request, keys)
        listed = await catalog.listed(time.monotonic() + READY_TIMEOUT_S)
        return _json({"object": "list", "data": [_model(name, served) for name, _, served in listed]})

    @app.get("/v1/models/{id:path}")
    async def model(request: Request) -> Response:
        _authenticate(request, keys)
        name = request.path_params["id"]
        _, served = await catalog.find(name, time.monotonic() + READY_TIMEOUT_S)
        return _json(_model(name, served))

    @app.get("/healthz")
    async def healthz(request: Request) -> Response:
        return _json({"status": "ok"})

    @app.get("/readyz")
    async def readyz(request: Request) -> Response:
        async def state(pipeline: Pipeline) -> str:
            try:
                async with asyncio.timeout(READY_TIMEOUT_S):
                    await pipeline.try_out()
            except TimeoutError:
                return f"no answer within {READY_TIMEOUT_S:g} s"
            except EmbeddingError as error:
                return str(error)
            return "asleep" if pipeline.is_asleep else "ready"

        states = await asyncio.gather(*(state(pipeline) for pipeline in catalog.pipelines))
        named = {p.settings.id: shown for p, shown in zip(catalog.pipelines, states, strict=True)}
        ready = "ready" in states or "asleep" in states
        # One model that can embed makes the service worth sending requests to; the others are named with their reason.
        return _json({"status": "ready" if ready else "not ready", "models": named}, 200 if ready else 503)

    # Swagger's page, and a redirect to it from `/`; its scripts come from a package, so it needs no internet.
    patch_fastapi(app, docs_url="/docs")
    if settings.cors_origins:
        app.allow_origins(settings.cors_origins)
    return app


class _App(FastAPI):
    """FastAPI, but its one busy route is reached without the layers around the others, a tenth of a short request's
    work in this process. So FastAPI's own telemetry does not see this route (Serve's metrics do), nor does what
    `add_middleware` adds.
    """

    PATH = "/v1/embeddings"

    def __init__(self, embeddings: Callable[[Request], Awaitable[Response]], **options: Any) -> None:
        super().__init__(**options)
        self.add_route(self.PATH, embeddings, methods=["POST"])  # whose name Serve looks up, for its metrics
        handlers = dict(self.exception_handlers)
        fault = handlers.pop(Exception, None)
        self._embeddings: ASGIApp = ServerErrorMiddleware(
            ExceptionMiddleware(request_response(embeddings), handlers), fault
        )

    def allow_origins(self, origins: Sequence[str]) -> None:
        """Let pages from these origins call this service."""
        options: dict[str, Any] = {
            "allow_origins": list(origins),
            "allow_methods": ["GET", "POST"],
            "allow_headers": ["*"],  # a browser's OpenAI client sends Authorization and a dozen x-stainless-* headers
            "expose_headers": ["x-request-id", "x-model-fingerprint", "x-truncated-inputs", "openai-processing-ms"],
        }
        self.add_middleware(CORSMiddleware, **options)
        self._embeddings = CORSMiddleware(self._embeddings, **options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_busy_route = scope["type"] == "http" and scope["path"] == self.PATH and scope["method"] == "POST"
        await (self._embeddings if is_busy_route else super().__call__)(scope, receive, send)


def _authenticate(request: Request, keys: Keys | None) -> None:
    if keys is not None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        keys.name_of(key.strip() if scheme.lower() == "bearer" else None)


def _model(name: str, served: Served) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": name.partition("/")[0],
        "origin": served.origin,
        "engine": served.engine,
        "precision": served.precision,
        "device": served.device,
        "dimensions": served.dimensions,
        "max_tokens": served.max_tokens,
        "fingerprint": served.fingerprint,
    }


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def _error(status: int, message: str, kind: str, param: str | None = None, code: str | None = None) -> Response:
    return Response(wire.render_error(message, kind, param, code), status, media_type="application/json")


async def _on_embedding_error(request: Request, error: EmbeddingError) -> Response:
    status, kind, code = next(ERRORS[base] for base in type(error).__mro__ if base in ERRORS)
    if status == 500:
        # What happened inside is for the log; the client learns that it may try again.
        logger.error(f"{type(error).__name__}: {error}")
        return _error(500, "The server had an error while processing your request. Try again.", kind)
    if isinstance(error, Unauthenticated) and error.key_was_sent:
        code = "invalid_api_key"
    response = _error(status, str(error), kind, getattr(error, "param", None), code)
    if isinstance(error, Overloaded):
        # OpenAI's clients wait at most 60 s, and some not at all for a fraction of a second.
        response.headers["retry-after"] = str(min(60, max(1, math.ceil(error.retry_after_s))))
    if isinstance(error, ModelUnavailable):
        response.headers["retry-after"] = str(LOADING_RETRY_AFTER_S)
    if status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    codes = {404: "unknown_url", 405: "method_not_supported", 413: "request_too_large", 415: "unsupported_content_type"}
    message = error.detail
    if error.status_code == 404:
        message = f"Invalid URL ({request.method} {request.url.path[:200]})"
    elif error.status_code == 405:
        message = f"Not allowed to {request.method} on {request.url.path[:200]}"
    response = _error(error.status_code, message, "invalid_request_error", code=codes.get(error.status_code))
    response.headers.update(error.headers or {})
    return response


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_fault(request: Request, error: Exception) -> Response:
    # Starlette raises the error again after this answer, so that it reaches the log with its traceback.
    return _error(500, "The server had an error while processing your request. Try again.", "server_error")


def _document(catalog: Catalog, settings: Settings) -> dict[str, Any]:
    """The OpenAPI document, with examples that name a model that is served."""
    names = [name for name, _, _ in catalog.served()]
    template = string.Template(resources.files(__package__).joinpath("openapi.yaml").read_text())
    filled = template.safe_substitute(model=(names or [settings.models[0].id])[0], max_inputs=settings.max_inputs)
    document: dict[str, Any] = yaml.safe_load(filled)
    return document
