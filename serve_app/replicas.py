"""The replicas of one deployment, as Serve knows them."""

import asyncio
import math
import time
from typing import Any

from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

# States in which a deployment without a replica may have meant to have none, and for how long that is believed.
SOUND = ("HEALTHY", "UPSCALING", "DOWNSCALING")
ASLEEP_S = 10.0


class Replicas:
    """Asks the replicas of one deployment who they are, or Serve why there are none."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self.deployment = handle.deployment_name
        self._handle = handle
        self._asleep_until = -math.inf

    async def describe(self, deadline: float) -> list[Any]:
        """What each of them says of itself; nothing of those that are silent."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                # Serve's public way to await these fails for all of them when one is silent.
                replies = await self._handle.broadcast("describe")._fetch_replica_results_async()
        except (TimeoutError, DeploymentUnavailableError):
            replies = []
        # Less than the whole time, so that the others can still be connected to when one is silent.
        left_s = (deadline - time.monotonic()) / 2
        waits = (asyncio.wait_for(reply.get_async(), left_s) for reply in replies)  # type: ignore[no-untyped-call]
        found = await asyncio.gather(*waits, return_exceptions=True)
        return [answer for answer in found if not isinstance(answer, BaseException)]

    async def are_asleep(self) -> bool:
        """Whether there are none because none is needed, or the first is only starting; Serve is asked now and then."""
        if time.monotonic() > self._asleep_until:
            status = await asyncio.to_thread(serve.status)
            application = status.applications.get(self._handle.app_name)
            ours = application.deployments.get(self.deployment) if application else None
            if ours is None or "RUNNING" in ours.replica_states or ours.status not in SOUND:
                return False
            self._asleep_until = time.monotonic() + ASLEEP_S
        return True
