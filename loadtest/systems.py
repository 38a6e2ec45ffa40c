"""What is measured: how each system is installed, started, found ready, and stopped."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import yaml

from loadtest.meter import Role, ray_role, server_role, tree
from loadtest.weights import FOUND
from loadtest.workload import MODEL, body
from serve_app.packing import Float32

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".peers"
INFINITY = PEERS / "infinity"
TORCH_MODEL, ONNX_MODEL = PEERS / "torch-model", PEERS / "onnx-model"
REQUIREMENTS = ["torch==2.13.0", "infinity-emb[server,torch,optimum]==0.0.78"]
CONSTRAINTS = Path(__file__).with_name("infinity_constraints.txt")
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 40.0
# No system may ask a hub for anything, nor find what somebody's cache holds, nor report its use.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": str(PEERS / "hub"),
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
PYTHON = sys.executable


class StartError(Exception):
    """A system that did not become ready."""


@dataclass(frozen=True)
class System:
    """A server: `url` is that of its API with `/v1`, `packages` those whose versions its `python` is asked for."""

    name: str
    url: str
    command: tuple[str, ...]
    python: str
    packages: tuple[str, ...]
    model: str = MODEL
    cwd: Path = ROOT
    environment: Mapping[str, str] = field(default_factory=dict)
    role: Role = server_role
    prepare: Callable[[], None] = lambda: None

    def versions(self) -> dict[str, str]:
        """Of Python and the packages that matter."""
        code = "import sys, json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]} | "
        code += "{'python': sys.version.split()[0]}))"
        ran = subprocess.run([self.python, "-c", code, *self.packages], capture_output=True, text=True, check=True)
        found: dict[str, str] = json.loads(ran.stdout)
        return found

    @contextmanager
    def running(self, folder: Path) -> Iterator[int]:
        """Start it, wait until it embeds, give its process id, and leave nothing of it behind; raises StartError.

        `folder` is for its log and whatever else it writes.
        """
        if self._answers():
            raise StartError(f"something else listens already where {self.name} would: {self.url}")
        log = folder / f"{self.name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                self.command,
                cwd=self.cwd,
                env=os.environ | OFFLINE | dict(self.environment),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while process.poll() is not None or not self._is_ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                    raise StartError(f"{self.name} did not become ready:\n{tail}")
                time.sleep(0.25)
            yield process.pid
        finally:
            _stop(process)

    def _answers(self) -> bool:
        where = urlsplit(self.url)
        try:
            socket.create_connection((where.hostname, where.port), timeout=1).close()
        except OSError:
            return False
        return True

    def _is_ready(self) -> bool:
        try:
            self.embed(["ready"])
        except OSError:  # nothing listens yet, or not with status 200
            return False
        return True

    def embed(self, texts: list[str]) -> Float32:
        """Vectors of the texts, float32 [B, D]."""
        request = urllib.request.Request(
            f"{self.url}/embeddings", body(texts, "base64").encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            data = json.load(answer)["data"]
        rows = [np.frombuffer(base64.b64decode(item["embedding"]), np.float32) for item in data]
        return np.stack(rows)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """As Ctrl-C does; then by force, with all that is left of its sessions."""
    family = tree(process.pid) if process.poll() is None else []
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    for member in family:
        with suppress(psutil.NoSuchProcess):  # also where its number went to another process meanwhile
            member.kill()
    process.wait()


def prepare_infinity(engine: str) -> None:
    """Its virtual environment and an engine's form of the model, once; minutes, and gigabytes where torch has CUDA."""
    infinity_python = str(INFINITY / "bin" / "python")
    if not (INFINITY / ".installed").exists():
        print("installing Infinity into .peers/infinity (once)", flush=True)
        subprocess.run([PYTHON, "-m", "venv", str(INFINITY)], check=True)
        install = [infinity_python, "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS), *REQUIREMENTS]
        subprocess.run(install, check=True)
        (INFINITY / ".installed").touch()
    if not TORCH_MODEL.exists():
        _publish(TORCH_MODEL, lambda folder: shutil.copytree(FOUND.folder, folder))
    if engine == "optimum" and not ONNX_MODEL.exists():
        print("exporting the model to ONNX (once)", flush=True)
        _publish(ONNX_MODEL, _export)


def _publish(folder: Path, make: Callable[[Path], object]) -> None:
    """Make a folder under another name first, so that one that is there is whole."""
    with tempfile.TemporaryDirectory(dir=PEERS) as scratch:
        make(Path(scratch, "made"))
        Path(scratch, "made").rename(folder)


def _export(folder: Path) -> None:
    command = [str(INFINITY / "bin" / "optimum-cli"), "export", "onnx", "--model", str(TORCH_MODEL)]
    options = ["--task", "feature-extraction", "--library", "transformers", str(folder)]
    subprocess.run([*command, *options], check=True, capture_output=True, env=os.environ | OFFLINE)
    # Infinity's ONNX engine cuts texts at max_position_embeddings (512), not at the model's own limit (256), and would
    # be given twice the work of the others with long texts. The exported graph itself doesn't read this file.
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"max_position_embeddings": FOUND.max_tokens}))


def _infinity(name: str, engine: str, model: str, cwd: Path, device: str = "cpu") -> System:
    options = f"--engine {engine} --device {device} --pooling-method mean --host 127.0.0.1 --port 7997 --url-prefix /v1"
    return System(
        name=name,
        url="http://127.0.0.1:7997/v1",
        command=(
            *(str(INFINITY / "bin" / "infinity_emb"), "v2", "--model-id", model, "--served-model-name", MODEL),
            *options.split(),
        ),
        python=str(INFINITY / "bin" / "python"),
        packages=("infinity-emb", "torch", "onnxruntime", "optimum", "transformers"),
        # It writes a cache into its working folder; and an absolute path of an ONNX folder trips a bug of optimum's.
        cwd=cwd,
        prepare=partial(prepare_infinity, engine),
    )


def _plain_serve(folder: Path) -> System:
    config = yaml.safe_load(Path(__file__).with_name("plain_serve.yaml").read_text())
    config["applications"][0]["args"] = {"folder": str(FOUND.folder), "max_tokens": FOUND.max_tokens}
    file = folder / "plain_serve.yaml"
    file.write_text(yaml.safe_dump(config))
    return System(
        name="plain-serve",
        url="http://127.0.0.1:8001/v1",
        command=(str(Path(PYTHON).with_name("serve")), "run", str(file)),
        python=PYTHON,
        packages=("ray", "torch", "transformers"),
        environment={"RAY_TMPDIR": str(folder)},  # so that it meets no other cluster
        role=ray_role,
    )


def _ours(config: str, *packages: str) -> System:
    return System(
        name="ours",
        url="http://127.0.0.1:8000/v1",
        command=(PYTHON, "-m", "serve_app", config),
        python=PYTHON,
        packages=("ray", "torch", "tokenizers", *packages),
        role=ray_role,
    )


def gpu_config(cores: int) -> dict[str, Any]:
    """serve_config.yaml with its model on a GPU, and as many replicas of the others as so many cores carry.

    Their numbers are fixed, so that none starts during a measurement.
    """
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    application = config["applications"][0]
    application["args"]["models"][0]["batch_tokens"] = 65_536
    changes = {
        "Ingress": {"num_replicas": max(1, cores // 2)},
        "Tokenizer": {"num_replicas": max(1, cores // 4)},
        "Model": {"num_replicas": 1, "ray_actor_options": {"num_cpus": 1, "num_gpus": 1}},
    }
    for deployment in application["deployments"]:
        del deployment["autoscaling_config"]
        deployment.update(changes[deployment["name"].split("-")[0]])
    return config


def gpu_systems(folder: Path) -> dict[str, System]:
    """Those that are measured on a GPU: the service, and Infinity's torch engine (its other would need an onnxruntime
    for CUDA)."""
    file = folder / "gpu.yaml"
    file.write_text(yaml.safe_dump(gpu_config(os.cpu_count() or 1)))
    peer = _infinity("infinity-torch", "torch", str(TORCH_MODEL), PEERS, device="cuda")
    return {system.name: system for system in (_ours(str(file)), peer)}


def systems(folder: Path) -> dict[str, System]:
    """All servers by name; `folder` is for what they are started with."""
    ours = _ours("serve_config.yaml", "openvino")
    peers = [
        _infinity("infinity-onnx", "optimum", ".", ONNX_MODEL),
        _infinity("infinity-torch", "torch", str(TORCH_MODEL), PEERS),
        _plain_serve(folder),
    ]
    return {system.name: system for system in (ours, *peers)}
