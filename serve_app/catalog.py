"""The configured models by name, and which names are really served."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

from serve_app.answers import Served
from serve_app.errors import ModelNotFound, ModelUnavailable
from serve_app.pipeline import Pipeline
from serve_app.settings import EMBEDDED_ID

# How long after its start an ingress holds requests for models of which it knows nothing yet: two questions that nobody
# answers. A model that says nothing for longer is loading, or has failed, and whoever asks for it is told at once.
FIRST_WORD_S = 10.0
# Before its deadline a request that was held needs so much to be refused as it should.
REFUSAL_S = 0.1


class Catalog:
    """The configured models by every name they answer to; tells the truth about what is really served."""

    def __init__(self, pipelines: Sequence[Pipeline]) -> None:
        self.pipelines = pipelines
        self._patient_until = time.monotonic() + FIRST_WORD_S
        self._configured = {
            name: pipeline for pipeline in pipelines for name in (pipeline.settings.id, *pipeline.settings.aliases)
        }

    async def listed(self, deadline: float) -> list[tuple[str, Pipeline, Served]]:
        """What is `served`, once all models have said so, or a young ingress has waited for that long enough."""
        await self._first_word(self.pipelines, deadline)
        return self.served()

    def served(self) -> list[tuple[str, Pipeline, Served]]:
        """Every name that answers now, with what stands behind it."""
        names: list[tuple[str, Pipeline, Served]] = []
        for pipeline in self.pipelines:
            if served := pipeline.served:
                aliases = pipeline.settings.aliases if served.id == pipeline.settings.id else ()
                names += [(name, pipeline, served) for name in (served.id, *aliases)]
        return names

    async def find(self, name: str, deadline: float) -> tuple[Pipeline, Served]:
        """The pipeline behind a name, and what it serves, once the replicas that may answer to it have said so.

        Raises ModelNotFound; or ModelUnavailable where they did not say it in time.
        """
        configured = self._configured.get(name)
        if (found := self._serving(name)) is not None:
            return found
        # A new replica of the ingress knows nothing yet, and a name may be that of what stands in for another model.
        candidates = [configured] if configured else self._stand_ins(name)
        await self._first_word(candidates, deadline)
        if (found := self._serving(name)) is not None:
            return found
        if configured is None and all(pipeline.served for pipeline in candidates):
            known = ", ".join(f"`{known}`" for known, _, _ in self.served()) or "none yet"
            raise ModelNotFound(f"The model `{name[:200]}` does not exist here. Models that are served: {known}.")
        if configured is None or configured.served is None:
            raise ModelUnavailable(f"The model `{name}` is loading, or failed to load; the server's log says which.")
        raise ModelNotFound(
            f"The model `{name}` is not served here: its weights were not found, and `{configured.served.id}` was "
            f"loaded in its place ({configured.served.origin}). Ask for that name, or give the service the weights of "
            f"`{configured.settings.id}` (setting `sources`)."
        )

    async def _first_word(self, pipelines: Sequence[Pipeline], deadline: float) -> None:
        """Wait until all have said what they serve, while this ingress is young and the deadline leaves time."""
        patience_s = min(deadline - REFUSAL_S, self._patient_until) - time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await asyncio.gather(*(pipeline.is_described.wait() for pipeline in pipelines))

    def _serving(self, name: str) -> tuple[Pipeline, Served] | None:
        configured = self._configured.get(name)
        if configured and configured.served and configured.served.id == configured.settings.id:
            return configured, configured.served
        return next(((pipeline, served) for known, pipeline, served in self.served() if known == name), None)

    def _stand_ins(self, name: str) -> list[Pipeline]:
        """The pipelines that may turn out to serve that name though it is none of theirs."""
        return [each for each in self.pipelines if name == EMBEDDED_ID and "embedded" in each.settings.sources]
