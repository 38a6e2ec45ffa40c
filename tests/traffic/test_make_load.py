"""`make load`'s command against a service that is right, or has one fault: each run is a process of its own.

Locust puts gevent's sockets in the place of Python's when it is imported, so nothing here imports it.
"""

import ast
import json
import re
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml

import loadtest.traffic
from loadtest.traffic.run import Run, read
from tests.traffic.planted import TOGETHER

ROOT = Path(__file__).parents[2]
PACKAGE = Path(loadtest.traffic.__file__).parent
START_TIMEOUT_S = 20.0


@contextmanager
def planted(fault: str) -> Iterator[str]:
    """The URL of a service with this fault."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "tests.traffic.planted", fault, str(port)], cwd=ROOT)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def load(url: str, folder: Path, *options: str, seconds: int = 4) -> tuple["subprocess.CompletedProcess[str]", Run]:
    """Run a load test; what it printed and recorded."""
    ran = python(
        *("-m", "locust", "-f", str(PACKAGE / "locustfile.py"), "--headless", "--loglevel", "WARNING"),
        *("--host", url, "--shape", "soak", "--run-time", f"{seconds}s", "--out", str(folder), *options),
        # No dashboard of whatever else runs on this machine is asked.
        *("--dashboard", "http://127.0.0.1:1"),
    )
    records = list(folder.glob("*.jsonl.gz"))
    assert len(records) == 1, ran.stdout + ran.stderr
    return ran, read(records[0])


def missed(printed: str) -> list[str]:
    return [line.removeprefix("MISSED").strip() for line in printed.splitlines() if line.startswith("MISSED")]


def modules(node: ast.AST) -> list[str]:
    """What a node imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def test_a_right_service_passes(tmp_path: Path) -> None:
    with planted("none") as url:
        ran, run = load(url, tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert missed(ran.stdout) == [] and ran.stderr == ""
    assert run.requests.right.all() and len(run.requests) > 100
    assert {"autocomplete", "mixed", "openai"} <= set(run.requests.kind.tolist())
    assert max(sample.users for sample in run.samples) == 20 and run.whole
    assert run.requests.at_s.max() < 6, "arrivals count from the run's start"
    assert re.search(r" s +\d+ users +[\d.]+ req/s .* 0 failed", ran.stdout), "the line that says how it goes"
    assert len(list(tmp_path.glob("*.html"))) == 1


@pytest.mark.parametrize(
    ("fault", "objective", "reason"),
    [
        ("exchanged-vectors", "no wrong answers", "vector"),
        ("reversed-items", "no wrong answers", "order"),
        ("short-vector", "no wrong answers", "dimension"),
        ("errors", "at most 0.10% refused", "status"),
    ],
)
def test_a_faulty_service_fails(tmp_path: Path, fault: str, objective: str, reason: str) -> None:
    with planted(fault) as url:
        ran, run = load(url, tmp_path)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert [each.split(":")[0] for each in missed(ran.stdout)] == [objective]
    assert {each.split(":")[0] for each in run.requests.fault.tolist() if each} == {reason}


def test_a_slow_tail_fails(tmp_path: Path) -> None:
    with planted("slow-tail") as url:
        ran, run = load(url, tmp_path)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert any(each.startswith("p99 of autocomplete at most 1,000 ms") for each in missed(ran.stdout))
    assert run.requests.right.all(), "every answer was right, some too late"
    assert np.percentile(run.requests.latency_ms, 50) < 300


def test_several_processes_load_together_and_lose_no_request(tmp_path: Path) -> None:
    with planted("errors") as url:
        ran, run = load(url, tmp_path, "--processes", "2")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert run.about["workers"] == 2 and max(sample.users for sample in run.samples) == 20
    # Each process learns the known texts by itself, with each client that it has.
    learnt = (run.requests.kind == "first answers") & run.requests.right
    assert learnt.sum() in (48, 64)
    assert run.requests.at_s.max() < 8 and len(run.requests) > 100


def test_the_openai_client_waits_without_holding_up_the_others() -> None:
    # The service answers when so many requests are there at once: a client that blocks its thread would wait for ever.
    script = f"""
import gevent, locust
from loadtest.traffic.clients import OpenAIClient
import sys
clients = [OpenAIClient(sys.argv[1] + "/v1", None) for _ in range({TOGETHER})]
asked = [gevent.spawn(client.embed, "planted", ["a text"]) for client in clients]
gevent.joinall(asked, timeout=20, raise_error=True)
print(sum(each.value.tokens for each in asked))
"""
    with planted("together") as url:
        ran = python("-c", script, url)
    assert ran.stdout.strip() == str(4 * TOGETHER), ran.stderr


def test_paced_users_count_lateness_from_when_they_were_due(tmp_path: Path) -> None:
    with planted("slow-tail") as url:
        _, run = load(url, tmp_path, "--pacing", "paced", "Autocomplete")
    due = run.requests.where(run.requests.kind == "autocomplete")
    slow = due.latency_ms > 1000
    # A user types a key each 0.24 s, and the service takes 1.5 s for some: the keys behind such a one are late, too.
    assert slow.mean() > 0.05, "every 25th request is slow by itself"


def test_without_a_service_it_says_so_at_once() -> None:
    ran = python("-m", "locust", "-f", str(PACKAGE / "locustfile.py"), "--headless", "--host", "http://127.0.0.1:1")
    assert ran.returncode == 1 and "nothing answers at http://127.0.0.1:1" in ran.stderr


def test_only_what_locust_loads_knows_locust() -> None:
    gevents = {"locust", "gevent", "geventhttpclient"}
    knowing = {
        file.stem
        for file in PACKAGE.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if gevents & {name.split(".")[0] for name in modules(node)}
    }
    assert knowing == {"clients", "locustfile", "session", "users"}


def test_the_manifest_gives_only_options_that_there_are() -> None:
    documents = list(yaml.safe_load_all((PACKAGE.parent / "kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Service", "Job", "Deployment"]
    _, job, workers = documents
    script = """
import json, sys
from loadtest.traffic import locustfile
from locust.argument_parser import get_parser
for arguments in json.loads(sys.argv[1]):
    print(get_parser().parse_args(arguments).expect_workers)
"""
    given = [each["spec"]["template"]["spec"]["containers"][0]["args"] for each in (job, workers)]
    ran = python("-c", script, json.dumps(given))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0] == str(workers["spec"]["replicas"])


def test_the_manifest_says_how_to_make_the_secret_that_it_reads() -> None:
    manifest = (PACKAGE.parent / "kubernetes.yaml").read_text()
    _, job, _ = yaml.safe_load_all(manifest)
    wanted = {
        each["name"]: each["valueFrom"]["secretKeyRef"]
        for each in job["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    # The service wants a key, and Ray's dashboard a token; without them there are no answers and no replicas.
    assert wanted == {
        "OPENAI_API_KEY": {"name": "load", "key": "key"},
        "RAY_AUTH_TOKEN": {"name": "load", "key": "token"},
    }
    assert (
        "create secret generic load --namespace embeddings --from-literal=key=sk-... --from-literal=token=" in manifest
    )


def test_the_image_has_all_that_the_load_imports() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["load"]
    named = {re.split(r"[=><]", requirement)[0] for requirement in extra} | {"loadtest", "gevent"}  # Locust's own
    for file in PACKAGE.glob("*.py"):
        imported = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(file.read_text()))
            for name in modules(node)
            if name.split(".")[0] not in sys.stdlib_module_names
        }
        assert imported <= named, file.name
