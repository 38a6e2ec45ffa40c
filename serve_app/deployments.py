"""The deployment graph, and the only file that knows Ray: Ingress -> Tokenizer -> Model for each configured model.

`build` is what `serve_config.yaml` names. How many replicas there are and what they run on stands in that file.
No `from __future__ import annotations` here: it would turn the annotation of `build` into a string, and Serve would
silently stop checking `args` against `Settings`.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from serve_app import engines, weights
from serve_app.engines import bert
from serve_app.errors import DeadlineExceeded, EmbeddingError, EngineError, ModelUnavailable, Overloaded, WeightsError
from serve_app.http import create_app
from serve_app.keys import Keys
from serve_app.packing import Frame, Packed, Tokenized, concat
from serve_app.pipeline import Catalog, Embedded, Pipeline, Served, deal
from serve_app.scheduler import Entry, Scheduler
from serve_app.settings import ModelSettings, Settings

logger = logging.getLogger("ray.serve")

# Times that a call is made at most. Embedding twice is harmless, so what a dying replica had accepted is sent again.
ATTEMPTS = 3
# How often the ingress asks a model that has not answered yet what it serves, and how long it waits for that.
DISCOVERY_PERIOD_S = 0.5
DISCOVERY_TIMEOUT_S = 5.0
# A batch is some hundred milliseconds of work: an engine at the same one for this long hangs.
ENGINE_STALL_S = 30.0
# Batches that fail in a row before the engine itself counts as broken, as CUDA is after one fault on the device.
ENGINE_FAILURES = 5
# What gRPC says when a replica has gone, is stopping, or broke off.
LOST = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL}
RETRY_PAUSE_S = 0.05
# Characters that are tokenized in under a millisecond, which is not worth a thread.
INLINE_CHARACTERS = 2_000


@serve.deployment(max_ongoing_requests=64)
class Tokenizer:
    """Turns texts into token ids; on any CPU node, many of them for one GPU."""

    def __init__(self, settings: ModelSettings) -> None:
        # Imported here since the other deployments share this file and have no use for the library.
        from serve_app.tokens import Tokenizer as TextTokenizer

        found = weights.resolve(settings)
        self._digest = found.tokenizer_digest
        self._tokenizer = TextTokenizer(found.folder, found.max_tokens, found.lowercase)
        if (known := self._tokenizer.frame.vocabulary) > found.vocabulary:
            raise WeightsError(f"{found.folder}: the tokenizer has {known} tokens, the model {found.vocabulary}")

    async def tokenize(self, texts: Sequence[str]) -> Tokenized:
        """Ids of the texts, in order."""
        if sum(map(len, texts)) <= INLINE_CHARACTERS:
            return self._tokenizer.tokenize(texts)
        return await asyncio.to_thread(self._tokenizer.tokenize, texts)

    async def describe(self) -> tuple[str, Frame]:
        """The digest of this replica's tokenizer, to be held against the model's, and what it puts around texts."""
        return self._digest, self._tokenizer.frame


@serve.deployment(max_ongoing_requests=256, health_check_period_s=5, health_check_timeout_s=10)
class Model:
    """Turns token ids into vectors with one engine, which never idles while work waits."""

    def __init__(self, settings: ModelSettings) -> None:
        found = weights.resolve(settings)
        network = bert.load(found.folder, found.pooling, found.normalize)
        self._engine = engines.open_engine(network, settings.engine, settings.precision, _cpus())
        self._scheduler: Scheduler[Packed, Embedded] = Scheduler(self._run, settings.batch_tokens, self._engine.lanes)
        self._failures = 0  # batches in a row
        self._served = Served(
            id=found.id,
            created=int(time.time()),
            origin=found.origin,
            engine=self._engine.name,
            precision=self._engine.precision,
            device=self._engine.device,
            dimensions=network.dimensions,
            normalize=found.normalize,
            max_tokens=found.max_tokens,
            weights=found.digest,
            fingerprint=engines.fingerprint(found.digest, self._engine),
            tokenizer=found.tokenizer_digest,
        )
        logger.info(f"serving {found.id} from {found.origin}, fingerprint {self._served.fingerprint}")

    async def infer(self, packed: Packed, timeout_s: float) -> Embedded:
        """Vectors of the sequences, in order; raises DeadlineExceeded if they could not start within `timeout_s`."""
        job: asyncio.Task[Embedded] = await self._infer_together((packed, time.monotonic() + timeout_s))
        return await job

    # `@serve.batch` seals a batch at every turn of the loop, whether the engine is free or not, so it only gathers the
    # calls of one turn; the scheduler behind it holds what waits. What this returns at once are jobs in that scheduler:
    # each call awaits its own, so none waits for another's, fails with another's, or outlives its caller.
    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0, max_concurrent_batches=16)
    async def _infer_together(self, calls: list[tuple[Packed, float]]) -> list[asyncio.Task[Embedded]]:
        jobs = (self._scheduler.submit(packed, packed.tokens, deadline) for packed, deadline in calls)
        return [asyncio.create_task(job) for job in jobs]

    async def _run(self, entries: Sequence[Entry[Packed, Embedded]]) -> list[Embedded]:
        jobs = [entry.job for entry in entries]
        started = time.perf_counter()
        self._failures += 1  # until it has not failed
        vectors = await asyncio.to_thread(self._engine.embed, concat(jobs))
        if not np.isfinite(vectors).all():
            raise EngineError("the engine gave vectors that are not finite")
        self._failures = 0
        infer_ms = (time.perf_counter() - started) * 1e3
        return deal(Embedded(vectors, self._served.weights, self._served.fingerprint, infer_ms), jobs)

    async def describe(self) -> Served:
        """What this replica serves."""
        return self._served

    async def check_health(self) -> None:
        """Raises EngineError, upon which Serve replaces this replica, once the engine hangs or fails at every batch."""
        if self._failures >= ENGINE_FAILURES:
            raise EngineError(f"the engine failed at the last {self._failures} batches")
        if self._scheduler.running_s > ENGINE_STALL_S:
            raise EngineError(f"the engine has been at one batch for {self._scheduler.running_s:.0f} s")


class RemoteStages:
    """The stages of one model as calls to its deployments: retried where that is safe, never past the deadline."""

    def __init__(self, name: str, tokenizer: DeploymentHandle[Any], model: DeploymentHandle[Any]) -> None:
        # Plain pickle writes arrays and strings faster than Serve's default, which can also pickle code.
        options: dict[str, Any] = {"request_serialization": "pickle", "response_serialization": "pickle"}
        self._name = name
        self._tokenizer = tokenizer.options(**options)
        self._model = model.options(**options)

    async def describe(self, deadline: float) -> tuple[Served, Frame]:
        """What the model's replicas serve; raises ModelUnavailable while none can say, or while they disagree."""
        digest, frame = await self._call(deadline, lambda _: self._tokenizer.describe.remote())
        served = await self._call(deadline, lambda _: self._model.describe.remote())
        if digest != served.tokenizer:
            raise ModelUnavailable(f"The replicas of `{self._name}` are changing to another model; try again.")
        return served, frame

    async def tokenize(self, texts: Sequence[str], deadline: float) -> Tokenized:
        """Ids of the texts, in order."""
        tokenized: Tokenized = await self._call(deadline, lambda _: self._tokenizer.tokenize.remote(texts))
        return tokenized

    async def infer(self, packed: Packed, deadline: float) -> Embedded:
        """Vectors of the sequences, in order."""
        embedded: Embedded = await self._call(deadline, lambda left_s: self._model.infer.remote(packed, left_s))
        return embedded

    async def _call(self, deadline: float, call: Callable[[float], Awaitable[Any]]) -> Any:
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(RETRY_PAUSE_S * 2**attempt)
            remaining_s = deadline - time.monotonic()
            try:
                async with asyncio.timeout(remaining_s):
                    return await call(remaining_s)
            except TimeoutError:
                raise DeadlineExceeded(f"No replica of `{self._name}` answered in time.") from None
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise  # this side gave the call up
                logger.warning(f"a replica of {self._name} gave up a call while stopping")
            except RayActorError as error:  # the replica died or is out of reach; another one can do the work
                logger.warning(f"a replica of {self._name} was lost with a call in flight: {type(error).__name__}")
            except grpc.aio.AioRpcError as error:
                if error.code() not in LOST:
                    raise
                logger.warning(f"a replica of {self._name} was lost with a call in flight: {error.code().name}")
            except RayTaskError as error:  # wraps what the replica raised, with a traceback in its message
                if isinstance(error.cause, EmbeddingError):
                    raise error.cause from None
                raise
            except BackPressureError:
                raise Overloaded(f"All replicas of `{self._name}` are busy.", retry_after_s=1) from None
            except DeploymentUnavailableError:
                raise ModelUnavailable(f"The model `{self._name}` failed to load; the server's log says why.") from None
        raise ModelUnavailable(f"The model `{self._name}` lost {ATTEMPTS} replicas in a row; try again.")


@serve.deployment(max_ongoing_requests=4096)
@serve.ingress()
class Ingress:
    """Speaks HTTP, and sends every request through its model's stages."""

    def __init__(
        self, settings: Settings, handles: Sequence[tuple[DeploymentHandle[Any], DeploymentHandle[Any]]]
    ) -> None:
        self._settings = settings
        self._keys = Keys(Path(settings.keys_file)) if settings.keys_file else None
        if self._keys is None:
            logger.warning("no keys_file is set: the service is open to everybody who can reach it")
        self._catalog = Catalog(
            [
                Pipeline(model, RemoteStages(model.id, tokenizer, replica), settings.max_request_tokens)
                for model, (tokenizer, replica) in zip(settings.models, handles, strict=True)
            ]
        )
        self._discoveries = [asyncio.ensure_future(_discover(pipeline)) for pipeline in self._catalog.pipelines]

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_app(self._catalog, self._settings, self._keys)


async def _discover(pipeline: Pipeline) -> None:
    """Ask until the model says what it serves: it may take minutes to load, and must not keep the others waiting."""
    while True:
        try:
            served = await pipeline.discover(time.monotonic() + DISCOVERY_TIMEOUT_S)
        except Exception as error:  # whatever it is, it must not end the asking
            if not isinstance(error, EmbeddingError):
                logger.exception(f"asking what {pipeline.settings.id} serves failed")
            await asyncio.sleep(DISCOVERY_PERIOD_S)
        else:
            stand_in = "" if served.id == pipeline.settings.id else f" in place of {pipeline.settings.id}"
            logger.info(f"{served.id} is served{stand_in}, fingerprint {served.fingerprint}")
            return


def _cpus() -> int:
    """Threads that this replica may keep busy: its num_cpus, rounded up."""
    resources: dict[str, float] = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
    return math.ceil(resources.get("CPU", 1.0))


def build(settings: Settings) -> serve.Application:
    """The application that `serve_config.yaml` names: `Tokenizer-NAME` and `Model-NAME` a model, and one `Ingress`."""
    tokenizer, model, ingress = cast(tuple[serve.Deployment, ...], (Tokenizer, Model, Ingress))  # mypy sees classes
    handles = [
        (
            tokenizer.options(name=f"Tokenizer-{each.slug}").bind(each),
            model.options(name=f"Model-{each.slug}").bind(each),
        )
        for each in settings.models
    ]
    return ingress.bind(settings, handles)
