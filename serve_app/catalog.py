"""The configured models by name, and which names are really served."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from serve_app.answers import Served
from serve_app.errors import EmbeddingError, ModelNotFound, ModelUnavailable
from serve_app.pipeline import Pipeline


class Catalog:
    """The configured models by every name they answer to; tells the truth about what is really served."""

    def __init__(self, pipelines: Sequence[Pipeline]) -> None:
        self.pipelines = pipelines
        self._configured = {
            name: pipeline for pipeline in pipelines for name in (pipeline.settings.id, *pipeline.settings.aliases)
        }

    def served(self) -> list[tuple[str, Pipeline, Served]]:
        """Every name that answers now, with what stands behind it."""
        names: list[tuple[str, Pipeline, Served]] = []
        for pipeline in self.pipelines:
            if served := pipeline.served:
                aliases = pipeline.settings.aliases if served.id == pipeline.settings.id else ()
                names += [(name, pipeline, served) for name in (served.id, *aliases)]
        return names

    async def find(self, name: str, deadline: float) -> Pipeline:
        """The pipeline behind a name, once the replicas that may answer to it have said what they serve.

        Raises ModelNotFound, or ModelUnavailable where they did not say it before `deadline`.
        """
        configured = self._configured.get(name)
        if (found := self._serving(name)) is None:
            # A new replica of the ingress knows nothing yet, and a name may be that of what stands in for another.
            asked = [configured] if configured else self.pipelines
            await asyncio.gather(*(_ask(pipeline, deadline) for pipeline in asked if not pipeline.served))
            found = self._serving(name)
        if found:
            return found
        if configured is None:
            known = ", ".join(f"`{known}`" for known, _, _ in self.served()) or "none yet"
            raise ModelNotFound(f"The model `{name[:200]}` does not exist here. Models that are served: {known}.")
        if configured.served is None:
            raise ModelUnavailable(f"The model `{name}` is loading, or failed to load; the server's log says which.")
        raise ModelNotFound(
            f"The model `{name}` is not served here: its weights were not found, and `{configured.served.id}` was "
            f"loaded in its place ({configured.served.origin}). Ask for that name, or give the service the weights of "
            f"`{configured.settings.id}` (setting `sources`)."
        )

    def _serving(self, name: str) -> Pipeline | None:
        configured = self._configured.get(name)
        if configured and configured.served and configured.served.id == configured.settings.id:
            return configured
        return next((pipeline for served_name, pipeline, _ in self.served() if served_name == name), None)


async def _ask(pipeline: Pipeline, deadline: float) -> None:
    """Have it known what the pipeline serves, if its replicas can tell."""
    with suppress(EmbeddingError):
        await pipeline.discover(deadline)
