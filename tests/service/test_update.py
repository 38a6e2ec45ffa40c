"""Rolling updates of the real service under load: no request fails, and no answer mixes two models."""

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from tests.model import MODEL
from tests.service.conftest import Keeper, free_port, get

pytestmark = pytest.mark.service

CLIENTS = 4
TEXTS = ["red shoes", "how long does red wine keep in the fridge", "tax return"]
# 151,500 tokens, 80 s of both models; in one body that HAProxy can't send to another replica.
LONG_LIST = ["red shoes " * 100] * 750
SERVES_PATIENCE_S = 20.0  # with a replica that is to go, unless told otherwise
REQUEST_TIMEOUT_S = 150.0
UPDATE_TIMEOUT_S = 180.0
DASHBOARD = "http://127.0.0.1:8265"
LOG_PORT = free_port()  # where HAProxy sends its log, which tells whose a failure was


def two_of_each(config: dict[str, Any]) -> None:
    """Two replicas of every deployment, so that one can be replaced while the other works; models that sleep instead of
    computing, so that there is a core for those that start."""
    [application] = config["applications"]
    application["args"]["models"] = [{"id": "Mihaiii/Ivysaur", "sources": ["embedded"], "engine": "sleep"}]
    application["args"]["request_timeout_s"] = REQUEST_TIMEOUT_S
    for deployment in application["deployments"]:
        del deployment["autoscaling_config"]
        deployment |= {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.1}}
    for environment in (config["controller_options"]["runtime_env"], application["runtime_env"]):
        environment["env_vars"]["RAY_SERVE_HAPROXY_LOG_TARGET"] = f"127.0.0.1:{LOG_PORT}"


class Failures(asyncio.DatagramProtocol):
    """The lines of HAProxy's log about requests with a status of 500 or more, or none."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def datagram_received(self, data: bytes, addr: object) -> None:
        line = data.decode()
        if re.search(r' (5\d\d|-1) \d+ .*"POST ', line):
            self.lines.append(line)


def other_settings(application: dict[str, Any]) -> None:
    application["args"]["models"][0]["batch_tokens"] = 512


def other_code(application: dict[str, Any]) -> None:
    application["runtime_env"]["env_vars"]["OTHER_CODE"] = "1"  # to Serve, code is what the runtime_env brings


def other_model(application: dict[str, Any]) -> None:
    application["args"]["models"][0]["normalize"] = False  # other vectors for every text


def run(tool: str, *arguments: str, **environment: str) -> str:
    """What a command of Ray prints."""
    command = [str(Path(sys.executable).with_name(tool)), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


async def test_updates_under_load(keeper: Keeper, tmp_path: Path) -> None:
    service = keeper.get(two_of_each)
    config = yaml.safe_load(service.log.with_name("serve_config.yaml").read_text())
    answers: list[httpx.Response] = []
    failed: list[str] = []
    listening, log = await asyncio.get_running_loop().create_datagram_endpoint(Failures, ("127.0.0.1", LOG_PORT))
    done = asyncio.Event()

    async def ask(http: httpx.AsyncClient) -> None:
        while not done.is_set():
            try:
                answers.append(await http.post("/v1/embeddings", json={"model": MODEL, "input": TEXTS}))
            except httpx.HTTPError as error:
                failed.append(repr(error))

    stopping: dict[str, list[float]] = {}  # replica of the ingress -> when it was seen to be about to go
    token = run("ray", "get-auth-token").strip()  # lets into the cluster that `serve run` started

    async def update(dashboard: httpx.AsyncClient, change: Callable[[dict[str, Any]], None]) -> None:
        async def state() -> tuple[float, str]:
            found = (await dashboard.get("/api/serve/applications/")).json()["applications"]["embeddings"]
            ingress = found["deployments"].get("Ingress", {"replicas": []})  # while it is deployed there are none yet
            for replica in ingress["replicas"]:
                if replica["state"] == "STOPPING":
                    stopping.setdefault(replica["replica_id"], []).append(time.monotonic())
            return found["last_deployed_time_s"], found["status"]

        before, _ = await state()
        change(config["applications"][0])
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        await asyncio.to_thread(run, "serve", "deploy", str(file), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
        async with asyncio.timeout(UPDATE_TIMEOUT_S):
            while (now := await state())[0] == before or now[1] != "RUNNING":  # noqa: ASYNC110  # asks a process
                await asyncio.sleep(0.5)

    headers, limits = {"authorization": f"Bearer {token}"}, httpx.Limits(max_connections=CLIENTS + 1)
    async with (
        httpx.AsyncClient(base_url=DASHBOARD, timeout=70, headers=headers) as dashboard,
        httpx.AsyncClient(base_url=service.url, timeout=REQUEST_TIMEOUT_S, limits=limits) as http,
        asyncio.TaskGroup() as load,
    ):
        for _ in range(CLIENTS):
            load.create_task(ask(http))
        for change in (other_settings, other_code, other_model):
            known = len(answers)
            if change is other_code:  # replaces every replica, also the ingress that is at this
                long = asyncio.create_task(http.post("/v1/embeddings", json={"model": MODEL, "input": LONG_LIST}))
            await update(dashboard, change)
            assert len(answers) > known, "nobody asked meanwhile"
            if change is other_code:
                answer = await long
                assert answer.status_code == 200, answer.text
                assert len(answer.json()["data"]) == len(LONG_LIST)
                longest_s = max(seen[-1] - seen[0] for seen in stopping.values())
                assert longest_s > SERVES_PATIENCE_S, "no ingress had to be waited for, so this shows nothing"
        async with asyncio.timeout(UPDATE_TIMEOUT_S):  # until the ingress has heard of it
            while answers[-1].headers["x-model-fingerprint"] == answers[0].headers["x-model-fingerprint"]:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        done.set()
    listening.close()

    failed += [
        f"{each.status_code} {each.text[:200]} {dict(each.headers)}" for each in answers if each.status_code != 200
    ]
    assert failed == [], f"{len(failed)} of {len(answers)}, and HAProxy says {log.lines}"
    lengths = np.array(
        [[np.linalg.norm(item["embedding"]) for item in answer.json()["data"]] for answer in answers], np.float32
    )
    is_unit = np.isclose(lengths, 1.0, atol=1e-3)
    assert (is_unit.all(axis=1) | ~is_unit.any(axis=1)).all(), "an answer of two models"
    assert is_unit[0].all() and not is_unit.all()
    fingerprints = {answer.headers["x-model-fingerprint"] for answer in answers}
    assert len(fingerprints) == 2, fingerprints
    assert b"READY" in service.log.read_bytes() and get(f"{service.url}/readyz")
    print(f"{len(answers)} requests during three updates, none failed")
