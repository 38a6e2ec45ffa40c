"""The deployment graph: Ingress -> Tokenizer -> Model for each configured model.

`build` is what `serve_config.yaml` names. How many replicas there are and what they run on stands in that file.
No `from __future__ import annotations` here: it would turn the annotation of `build` into a string, and Serve would
silently stop checking `args` against `Settings`.
"""

import asyncio
import gc
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from serve_app import engines, weights
from serve_app.answers import Embedded, Served, deal
from serve_app.autoscale import RATE, WAITING, asked_of
from serve_app.catalog import Catalog
from serve_app.channel import Endpoint, Listener
from serve_app.discovery import refresh
from serve_app.engines import bert
from serve_app.engines.guard import Guard
from serve_app.errors import EngineBroken, EngineError, WeightsError
from serve_app.http import create_app
from serve_app.keys import Keys
from serve_app.packing import Packed, Tokenized, concat, typical
from serve_app.pipeline import CALL_CHARACTERS, Pipeline
from serve_app.rate import Rate
from serve_app.replicas import Replicas
from serve_app.scheduler import Entry, Scheduler
from serve_app.settings import ModelSettings, Settings
from serve_app.stages import RemoteStages
from serve_app.threads import background

logger = logging.getLogger("ray.serve")
Queue = Scheduler[Packed, Embedded]

# After so long without a batch a brief one need not leave the loop free for others: only one caller asks.
LULL_S = 0.001
DRAIN_MARGIN_S = 10.0  # of an ingress that is to go, for what comes until HAProxy knows
ENGINE_STALL_S = 30.0  # at one batch, which is some hundred milliseconds of work: the engine hangs
# Characters that are tokenized in under a millisecond, which is not worth a thread; and those of one text at most.
INLINE_CHARACTERS, TEXT_CHARACTERS = 2_000, 8_192
# What a tokenizer tries itself out with, as many as make a full call: of its slower texts, which can't be looked up.
TYPICAL_TEXTS = ["how long does rosé wine keep once the bottle is open"] * (CALL_CHARACTERS // 52)
# How many more objects there must be before Python looks for cycles among them. A request makes none, and has some 60
# objects while it waits. With Python's own 700 the ingress looked for 6 % of its time; with 5,000 0.2 s at a stretch.
COLLECTED_AT = 50_000


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
        self._cores = max(1, _cpus())
        self._threads = background(self._cores, settings.bulk_share)
        self._waiting_characters, self._rate, self._worked_s = 0, Rate(CALL_CHARACTERS), 0.0  # of all cores together
        self._work(TYPICAL_TEXTS)  # the first time it loads what it calls
        self._record(CALL_CHARACTERS, self._work(TYPICAL_TEXTS)[1])
        self._listener = Listener({"tokenize": self.tokenize, "hand_over": self.hand_over})
        self._endpoint = asyncio.ensure_future(self._listener.open(_host()))

    async def tokenize(self, texts: Sequence[str], deadline: float) -> Tokenized:
        """Ids of the texts, in order."""
        if (characters := sum(map(len, texts))) <= INLINE_CHARACTERS:
            return self._tokenizer.tokenize(texts)
        self._waiting_characters += characters
        try:
            threads = self._threads if characters > TEXT_CHARACTERS else None
            tokenized, core_s = await asyncio.get_running_loop().run_in_executor(threads, self._work, texts)
        finally:
            self._waiting_characters -= characters
        self._record(characters, core_s)
        return tokenized

    def _work(self, texts: Sequence[str]) -> tuple[Tokenized, float]:
        """Ids of the texts, and the seconds of a core that they took. By the clock it is more where models have the
        cores, and then another replica on this node would only take what is left from this one."""
        started_s = time.thread_time()
        return self._tokenizer.tokenize(texts), time.thread_time() - started_s

    def _record(self, characters: int, core_s: float) -> None:
        started_s, self._worked_s = self._worked_s, self._worked_s + core_s / self._cores
        self._rate.record(characters, started_s, self._worked_s)

    async def hand_over(self, _: None, deadline: float) -> tuple[str, Any]:
        """The tokenizer itself with its digest, for callers that do short texts on their own, and long ones in need."""
        return self._digest, self._tokenizer

    async def check_health(self) -> None:
        """Raises OSError, upon which Serve replaces this replica, where it could not listen."""
        await self._endpoint

    async def describe(self) -> tuple[str, Endpoint]:
        """The digest of this replica's tokenizer, to be held against the model's, and where it listens."""
        return self._digest, await self._endpoint

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What serve_app.autoscale decides by, in characters."""
        return {WAITING: self._waiting_characters, RATE: self._rate.per_s}

    async def __del__(self) -> None:  # Serve awaits it before it ends a replica, also one that could not start
        if hasattr(self, "_listener"):
            await self._listener.close()


@serve.deployment(max_ongoing_requests=256, health_check_period_s=5, health_check_timeout_s=10)
class Model:
    """Turns token ids into vectors with one engine, which never idles while work waits."""

    def __init__(self, settings: ModelSettings) -> None:
        found = weights.resolve(settings)
        network = bert.load(found.folder, found.pooling, found.normalize)
        engine = engines.open_engine(network, settings.engine, settings.precision, _cpus())
        self._engine = Guard(engine, network.dimensions)
        self._broken: EngineBroken | None = None
        # Short requests and long ones have each their queue and threads, and those of the long ones give way.
        queue = partial(Queue, budget=settings.batch_tokens, lanes=engine.lanes, lane_cost=engine.lane_tokens)
        bulk = background(engine.lanes, settings.bulk_share)
        self._short, self._long = (queue(partial(self._run, threads)) for threads in (None, bulk))
        self._rate = Rate(settings.batch_tokens)
        with ThreadPoolExecutor(engine.lanes) as lanes:
            batches = [typical(settings.batch_tokens)] * engine.lanes
            self._rate.try_out(batches[0].tokens * len(batches), lambda: list(lanes.map(engine.embed, batches)))
        self._served = Served(
            id=found.id,
            created=int(time.time()),
            origin=found.origin,
            engine=engine.name,
            precision=engine.precision,
            device=engine.device,
            lanes=engine.lanes,
            lane_tokens=engine.lane_tokens,
            dimensions=network.dimensions,
            normalize=found.normalize,
            max_tokens=found.max_tokens,
            weights=found.digest,
            fingerprint=engines.fingerprint(found.digest, engine),
            tokenizer=found.tokenizer_digest,
        )
        self._listener = Listener({"infer": self.infer, "infer_bulk": self.infer_bulk})
        self._endpoint = asyncio.ensure_future(self._listener.open(_host()))
        logger.info(f"serving {found.id} from {found.origin}, fingerprint {self._served.fingerprint}")

    async def infer(self, packed: Packed, deadline: float) -> Embedded:
        """Vectors of the sequences, in order; raises DeadlineExceeded if they could not start in time."""
        if self._short.has_room:
            return await self._short.submit(packed, packed.tokens, deadline)
        job: asyncio.Task[Embedded] = await self._infer_together((packed, deadline))
        return await job

    # `@serve.batch` seals a batch at every turn of the loop, whether the engine is free or not, so it only gathers the
    # calls of one turn, as jobs of the scheduler that holds what waits; each call awaits its own. With an idle engine
    # there is nothing to gather, and the decorator's own turns of the loop would take 0.4 ms.
    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0, max_concurrent_batches=16)
    async def _infer_together(self, calls: list[tuple[Packed, float]]) -> list[asyncio.Task[Embedded]]:
        jobs = (self._short.submit(packed, packed.tokens, deadline) for packed, deadline in calls)
        return [asyncio.create_task(job) for job in jobs]

    async def infer_bulk(self, packed: Packed, deadline: float) -> Embedded:
        """The same for a part of a long request, which leaves the processor to short ones, and is a batch by itself."""
        return await self._long.submit(packed, packed.tokens, deadline)

    async def _run(self, threads: Executor | None, entries: Sequence[Entry[Packed, Embedded]]) -> list[Embedded]:
        jobs = [entry.job for entry in entries]
        started = time.perf_counter()
        packed = concat(jobs)
        is_alone = threads is None and self._short.running == 1 and started - self._rate.ended > LULL_S
        try:
            if is_alone and packed.tokens <= self._engine.engine.brief_tokens:
                vectors = self._engine.embed(packed)
            else:
                vectors = await asyncio.get_running_loop().run_in_executor(threads, self._engine.embed, packed)
        except EngineBroken as error:
            self._broken = error
            raise
        ended = time.perf_counter()
        self._rate.record(packed.tokens, started, ended)
        return deal(Embedded(vectors, self._served.weights, self._served.fingerprint, (ended - started) * 1e3), jobs)

    async def describe(self) -> tuple[Served, Endpoint, float]:
        """What this replica serves, where it listens, and the tokens/s that it has for each of its callers; raises
        EngineBroken once it is of no more use."""
        if self._broken:
            raise self._broken
        return self._served, await self._endpoint, self._rate.per_s / max(1, len(self._listener.peers))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What serve_app.autoscale decides by, in tokens."""
        return {WAITING: self._short.unfinished_cost + self._long.unfinished_cost, RATE: self._rate.per_s}

    async def __del__(self) -> None:  # Serve awaits it before it ends a replica, also one that could not start
        if hasattr(self, "_listener"):
            await self._listener.close()

    async def check_health(self) -> None:
        """Raises EngineError, upon which Serve replaces this replica, once the engine hangs or fails at everything; or
        OSError where it could not listen."""
        await self._endpoint
        if self._broken:
            raise self._broken
        if (running_s := max(self._short.running_s, self._long.running_s)) > ENGINE_STALL_S:
            raise EngineError(f"the engine has been at one batch for {running_s:.0f} s")


@serve.deployment(max_ongoing_requests=4096)
@serve.ingress()
class Ingress:
    """Speaks HTTP, and sends every request through its model's stages."""

    def __init__(
        self, settings: Settings, handles: Sequence[tuple[DeploymentHandle[Any], DeploymentHandle[Any]]]
    ) -> None:
        gc.set_threshold(COLLECTED_AT)
        self._settings = settings
        self._keys = Keys(Path(settings.keys_file)) if settings.keys_file else None
        if self._keys is None:
            logger.warning("no keys_file is set: the service is open to everybody who can reach it")
        models = settings.models
        self._stages = [RemoteStages(each.id, *map(Replicas, pair)) for each, pair in zip(models, handles, strict=True)]
        pipelines = [
            Pipeline(each, stages, settings.max_request_tokens)
            for each, stages in zip(models, self._stages, strict=True)
        ]
        self._catalog = Catalog(pipelines)
        self._refreshing = [
            asyncio.ensure_future(refresh(pipeline, stages.is_settled))
            for pipeline, stages in zip(pipelines, self._stages, strict=True)
        ]

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_app(self._catalog, self._settings, self._keys)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What serve_app.autoscale decides by: the work that is held here, and all that was asked, of each stage; and
        this replica's own, in seconds of the one core that nearly all of it shares."""
        held = zip(self._stages, self._catalog.pipelines, strict=True)
        stats = {name: work for stages, pipeline in held for name, work in stages.report(pipeline).items()}
        return stats | {asked_of("Ingress"): time.process_time(), RATE: 1.0}


def _host() -> str:
    """The address under which this replica's node is known to the others."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


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
    # A replica that is to go answers what it has, however long that may take; Serve would end it after 20 s.
    patient = ingress.options(graceful_shutdown_timeout_s=settings.request_timeout_s + DRAIN_MARGIN_S)
    return patient.bind(settings, handles)
