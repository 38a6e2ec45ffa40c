"""Hosts of their own on one machine: network namespaces behind one switch, a Ray node in each, with cables to cut.

The switch is a bridge in the head's namespace, so that no rule of this machine's firewall is in the way. This machine
has a cable to it as well, over which the tests ask what clients and operators ask.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from serve_app.__main__ import NODE_ENVIRONMENT
from serve_app.session import stop

ROOT = Path(__file__).parents[2]
GCS_PORT, DASHBOARD_PORT = 6379, 8265
HEAD, CLIENT = 1, 254  # last bytes of the addresses; the hosts have those after the head's
SWITCH = "switch"


class Host:
    """A namespace with an address, and a Ray node in it, which is started anew when it ends, as a kubelet does it."""

    def __init__(
        self, namespace: str, address: str, port: str, folder: Path, environment: dict[str, str], flags: list[str]
    ) -> None:
        """`port` is where its cable ends at the switch."""
        self.namespace, self.address, self.port = namespace, address, port
        self._folder, self._environment, self._flags = folder, environment, flags
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        command = ["ip", "netns", "exec", self.namespace, tool("ray"), "start", *self._flags]
        command += [f"--node-ip-address={self.address}", f"--temp-dir={self._folder}"]
        command += ["--object-store-memory=100000000", "--block"]
        with self._folder.with_suffix(".log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )

    def keep(self) -> None:
        """Start the node again where it has ended."""
        if not self.runs:
            self.stop()
            self.start()

    def stop(self) -> None:
        if self._process is not None:
            stop(self._process)
        # Also what is in no session of the node's own: nobody else is in this namespace.
        for pid in ip("netns", "pids", self.namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


class Network:
    """A head that serves no model, and so many hosts with room for one model each."""

    def __init__(self, hosts: int, folder: Path, environment: dict[str, str]) -> None:
        self._name = f"ray-{secrets.token_hex(3)}"
        # Of the range that is kept for tests between networks (RFC 2544), so that no route of this machine is hidden.
        subnet = f"198.18.{secrets.randbelow(256)}"
        addresses = {number: f"{subnet}.{number}" for number in (HEAD, CLIENT, *range(HEAD + 1, HEAD + 1 + hosts))}
        self._addresses = addresses
        self.token = secrets.token_hex(32)
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "PYTHONPATH": str(ROOT),
            **NODE_ENVIRONMENT,
            **environment,
        }
        flags = ["--head", f"--port={GCS_PORT}", "--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD_PORT}"]
        flags += ["--num-cpus=0", f"--resources={json.dumps({'head': 1})}"]
        self.head = Host(f"{self._name}-head", addresses[HEAD], SWITCH, folder / "head", self.environment, flags)
        self.hosts = [
            Host(
                f"{self._name}-{number}",
                addresses[number],
                f"port{number}",
                folder / str(number),
                self.environment,
                [f"--address={addresses[HEAD]}:{GCS_PORT}", "--num-cpus=1"],
            )
            for number in range(HEAD + 1, HEAD + 1 + hosts)
        ]

    @property
    def dashboard(self) -> str:
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    def ask(self, path: str) -> Any:
        """What the dashboard's API answers."""
        request = urllib.request.Request(self.dashboard + path, headers={"authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def build(self) -> None:
        """Namespaces, cables and addresses; raises CalledProcessError where this machine does not let us."""
        head = self.head.namespace
        for host in (self.head, *self.hosts):
            ip("netns", "add", host.namespace)
            ip("-n", host.namespace, "link", "set", "lo", "up")
        ip("-n", head, "link", "add", SWITCH, "address", _ethernet(HEAD), "type", "bridge")
        self._connect(SWITCH, HEAD, head)
        ip("link", "add", self._name, "address", _ethernet(CLIENT), "type", "veth", "peer", "client", "netns", head)
        self._plug("client")
        self._connect(self._name, CLIENT)
        for number, host in enumerate(self.hosts, HEAD + 1):
            peer = ("peer", host.port, "netns", head)
            ip("-n", host.namespace, "link", "add", "eth0", "address", _ethernet(number), "type", "veth", *peer)
            self._plug(host.port)
            self._connect("eth0", number, host.namespace)

    def _plug(self, port: str) -> None:
        ip("-n", self.head.namespace, "link", "set", port, "master", SWITCH, "up")

    def _connect(self, device: str, number: int, namespace: str | None = None) -> None:
        """Give a device its address, and the others' Ethernet addresses for good: a host that nobody can reach is then
        silent, as behind a router, where otherwise the kernel would soon know that it has no neighbour there."""
        within = ("-n", namespace) if namespace else ()
        ip(*within, "address", "add", f"{self._addresses[number]}/24", "dev", device)
        ip(*within, "link", "set", device, "up")
        for other, address in self._addresses.items():
            if other != number:
                ip(*within, "neighbour", "add", address, "lladdr", _ethernet(other), "dev", device, "nud", "permanent")

    def cut(self, host: Host) -> None:
        """Pull its cable out of the switch: nothing comes from this host or gets to it, and nobody is told."""
        ip("-n", self.head.namespace, "link", "set", host.port, "nomaster")

    def heal(self, host: Host) -> None:
        self._plug(host.port)

    def remove(self) -> None:
        """Leave nothing, however far it got."""
        known = ip("netns", "list").split()
        made = [host for host in (*self.hosts, self.head) if host.namespace in known]
        for host in made:
            host.stop()
        with contextlib.suppress(subprocess.CalledProcessError):  # it never was
            ip("link", "delete", self._name)
        for host in made:
            ip("netns", "delete", host.namespace)


def reason_against() -> str | None:
    """Why this machine can't have hosts of their own; None if it can."""
    if not shutil.which("ip"):
        return "there is no `ip` (iproute2)"
    probe = f"ray-{secrets.token_hex(3)}"
    try:
        ip("netns", "add", probe)
        try:
            ip("-n", probe, "link", "add", SWITCH, "type", "bridge")
        finally:
            ip("netns", "delete", probe)
    except subprocess.CalledProcessError as error:
        return f"network namespaces can't be made here: {' '.join(error.stderr.split())}"
    return None


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _ethernet(number: int) -> str:
    return f"02:00:00:00:00:{number:02x}"
