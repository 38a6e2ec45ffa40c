"""The replicas of one deployment, as Serve knows them."""

import asyncio
import math
import time
from typing import Any

from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

# States in which a deployment without a replica may have meant to have none; and for how long that, and the contrary,
# is believed: to say it the controller goes through all that it knows.
SOUND = ("HEALTHY", "UPSCALING", "DOWNSCALING")
ASLEEP_S, AWAKE_S = 10.0, 2.0


class Replicas:
    """Asks the replicas of one deployment who they are, or Serve why there are none."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self.deployment = handle.deployment_name
        self._handle = handle
        self._is_asleep, self._believed_until = False, -math.inf
        self._answered: frozenset[Any] | None = None  # those that all answered, when they were asked last

    @property
    def is_settled(self) -> bool:
        """Whether each that Serve's controller has named by now has answered, so that asking would tell little new."""
        return self._answered == self._named()

    def _named(self) -> frozenset[Any]:
        """What the controller told the handle; Serve has no public way to ask that, short of calling them all."""
        if not self._handle._router:  # until the first call
            return frozenset()
        router = self._handle._router._asyncio_router.request_router  # type: ignore[attr-defined]
        return frozenset(router.curr_replicas if router else ())

    async def describe(self, deadline: float) -> list[Any]:
        """What each of them says of itself; nothing of those that are silent."""
        named = self._named()
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
        answers = [answer for answer in found if not isinstance(answer, BaseException)]
        self._answered = named if len(answers) == len(named) else None
        return answers

    async def are_asleep(self) -> bool:
        """Whether there are none because none is needed, or the first is only starting; Serve is asked now and then."""
        if time.monotonic() > self._believed_until:
            status = await asyncio.to_thread(serve.status)
            application = status.applications.get(self._handle.app_name)
            ours = application.deployments.get(self.deployment) if application else None
            self._is_asleep = ours is not None and "RUNNING" not in ours.replica_states and ours.status in SOUND
            self._believed_until = time.monotonic() + (ASLEEP_S if self._is_asleep else AWAKE_S)
        return self._is_asleep
