"""The real service for the tests of this folder: `python -m serve_app` on a free port, one at a time.

Two clusters on one machine would fight for HAProxy's ports, so a test that asks for another configuration ends the one
before. Tests are grouped to make that rare: by file, and the files of the service as it is configured come first.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
AS_CONFIGURED = ("broken_http", "clients", "disconnects", "fuzz", "schema", "start_stop")  # the last one ends it
START_TIMEOUT_S = 120.0

Change = Callable[[dict[str, Any]], None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each other configuration costs a start, so all tests of the usual one come before the first of another."""
    others = {path for path in HERE.glob("test_*.py") if path.stem.removeprefix("test_") not in AS_CONFIGURED}
    items.sort(key=lambda item: item.path in others)


@dataclass
class Service:
    """A running service."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> int:
        """End it as Ctrl-C does; the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(90)


def start(folder: Path, change: Change | None = None) -> Service:
    """Start the service of serve_config.yaml with one change, and wait until it says that it is ready."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    port = free_port()
    config["http_options"]["port"] = port
    if change is not None:
        change(config)
    file, log = folder / "serve_config.yaml", folder / "log.txt"
    file.write_text(yaml.safe_dump(config))
    # No hub, and no model that somebody's cache holds: the tests know the embedded one.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    with log.open("wb") as out:
        command = [sys.executable, "-m", "serve_app", str(file)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment)
    service = Service(f"http://127.0.0.1:{port}", process, log)
    deadline = time.monotonic() + START_TIMEOUT_S
    while "\nREADY " not in f"\n{log.read_text()}":
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the service did not become ready:\n{log.read_text()[-4000:]}")
        time.sleep(0.2)
    return service


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Keeper:
    """Keeps the service that was asked for last."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._change: Change | None = None
        self._running: Service | None = None

    def get(self, change: Change | None = None) -> Service:
        if self._running is None or self._change is not change or self._running.process.poll() is not None:
            self.stop()
            self._running, self._change = start(self._factory.mktemp("service"), change), change
        return self._running

    def stop(self) -> None:
        if self._running is not None and self._running.process.poll() is None:
            self._running.stop()
        self._running = None


@pytest.fixture(scope="session")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keeper]:
    keeper = Keeper(tmp_path_factory)
    yield keeper
    keeper.stop()


@pytest.fixture
def service(keeper: Keeper) -> Service:
    """The service exactly as serve_config.yaml has it, but for its port."""
    return keeper.get()


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        body: bytes = answer.read()
        return body
