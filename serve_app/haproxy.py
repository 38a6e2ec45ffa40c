"""HAProxy outlives a Serve actor that died, and is back at once where it died itself.

Ray ends the process group of a worker that died, HAProxy with it, and Serve takes some eight seconds to have another:
until then every connection is refused. Here HAProxy is in a group of its own, which ends with the node's raylet. Ray's
class is the base, so this file belongs to the one release of Ray that pyproject.toml names.
"""

import asyncio
import logging
import os
import signal
import sys
from asyncio.subprocess import Process
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.serve._private import haproxy
from ray.serve._private.constants import RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S as STARTUP_TIMEOUT_S

from serve_app import leash

# How long a new actor leaves the service to the HAProxy that it found, until it knows the replicas itself. Serve itself
# gives an actor five seconds to be ready.
TARGETS_TIMEOUT_S = 2.0
# How often it is looked whether HAProxy lives, or is there yet, and for how long before the latter is left to Serve;
# and how long after a start that failed the next is tried.
WATCH_PERIOD_S, LOOK_TIMEOUT_S, RETRY_S = 0.05, 1.0, 1.0

logger = logging.getLogger("ray.serve")


class LastingHAProxy(haproxy.HAProxyApi):
    """Serve's HAProxy, which ends with the raylet, not with the actor, and has the sockets of whichever ran before."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._changing = asyncio.Lock()
        self._has_targets = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._leash: int | None = None  # whose process group HAProxy is in

    async def start(self) -> None:
        """Start; where one is found running, not before there is something to route to."""
        try:
            self._leash = self._find_leash()
            os.setpgid(0, self._leash)
        except OSError as error:
            logger.warning(f"HAProxy will end with this actor, whose process group can't be changed: {error}")
        if self._running():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._has_targets.wait(), TARGETS_TIMEOUT_S)
        await super().start()
        self._keeper = asyncio.create_task(self._keep())

    def set_backend_configs(self, backend_configs: dict[str, haproxy.BackendConfig]) -> None:
        """What to route to from the next start or reload on."""
        super().set_backend_configs(backend_configs)
        if backend_configs:
            self._has_targets.set()

    async def stop(self) -> None:
        """End it for good, and whatever else runs with this node's configuration: nobody else would."""
        if self._keeper is not None:
            self._keeper.cancel()
        async with self._changing:
            await super().stop()
            for pid in self._running():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        if self._leash is not None:
            with suppress(ProcessLookupError):
                os.kill(self._leash, signal.SIGKILL)

    async def _keep(self) -> None:
        """Start it again the moment it dies; looked at again and again, as a reload puts another one in its place."""
        while True:
            await asyncio.sleep(WATCH_PERIOD_S)
            try:
                async with self._changing:
                    await self._revive()
            except Exception:
                logger.exception("HAProxy could not be started again")
                await asyncio.sleep(RETRY_S)

    async def _revive(self) -> None:
        dead = self._proc
        # One that answers is another actor's, which has taken this one's place.
        if dead is None or dead.returncode is None or await self._get_running_pid() is not None:
            return
        logger.warning(f"HAProxy (process {dead.pid}) ended with {dead.returncode}, and is started again")
        self._proc = await self._start_and_wait_for_haproxy()
        self._retire_log_files(dead)

    async def _graceful_reload(self) -> None:
        async with self._changing:
            if self._proc is not None and self._proc.returncode is not None:
                await self._revive()  # it reads the new configuration, too
            else:
                await super()._graceful_reload()

    async def _start_and_wait_for_haproxy(self, *arguments: str, **options: Any) -> Process:
        """Where it is no reload, have whichever ran before hand over its sockets, and finish what it has."""
        if not arguments and (running := self._running()):
            can_hand_over = await self._get_running_pid() is not None
            arguments = ("-sf", *running, *(["-x", self.cfg.socket_path] if can_hand_over else []))
        return await super()._start_and_wait_for_haproxy(*arguments, **options)

    async def _wait_for_hap_availability(self, proc: Process, timeout_s: int = STARTUP_TIMEOUT_S) -> None:
        """Look more often than Serve, which does every half a second, and whose own start waits for this one. After a
        while, and for whatever goes wrong, it is Serve that waits."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                while proc.returncode is None:
                    if await self._get_running_pid() == proc.pid:
                        break
                    await asyncio.sleep(WATCH_PERIOD_S)
        await super()._wait_for_hap_availability(proc, timeout_s)

    def _find_leash(self) -> int:
        """The leader of the process group that a running HAProxy is in; where none runs, of a new one.

        Raises OSError where none could be started.
        """
        for pid in self._running():
            with suppress(OSError):  # it is just ending
                leader = os.getpgid(int(pid))
                if leash.__file__.encode() in Path(f"/proc/{leader}/cmdline").read_bytes():
                    return leader
        command = [sys.executable, "-I", "-S", leash.__file__, os.environ["RAY_RAYLET_PID"]]  # which Ray gives workers
        return os.posix_spawn(sys.executable, command, os.environ, setpgroup=0)

    def _running(self) -> list[str]:
        """The ids of all that run with this node's configuration, whichever actor started them."""
        return [path.name for path in Path("/proc").glob("[0-9]*") if self._is_our_haproxy(int(path.name))]
