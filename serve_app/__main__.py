"""`python -m serve_app serve_config.yaml`: `serve run` on this machine, with the checks and the closing line it lacks.

What goes wrong at a start is said in one sentence with exit status 1: a setting, a port, a cluster that already runs.
The service itself is that of `serve run serve_config.yaml`, but starts and stops sooner.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from serve_app.autoscale import DrainTime
from serve_app.session import drain, stop
from serve_app.settings import Settings

IMPORT_PATH = "serve_app.deployments:build"
POLICY = "serve_app.autoscale:DrainTime"
# HAProxy's ports beside the service's own, and Serve's fallback behind it: one of each to a machine.
HAPROXY_PORTS = {
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
}
# How often `/readyz` is asked; once a model is ready, for others that may come later.
POLL_PERIOD_S, PARTLY_READY_PERIOD_S = 0.1, 0.5
# States of a model that nobody needs to wait for.
SETTLED = {"ready", "asleep"}
# How often a start that takes long says what it waits for.
NOTICE_PERIOD_S = 20.0
# For the node that `serve run` starts. Ray starts workers at niceness 15, which costs a service that owns its machine
# a fifth of its throughput; a service that is being tried out has no reason to report its use; and workers that Ray
# starts ahead gain nothing: of no use where Serve's have an environment of their own, else in the way of the rest.
NODE_ENVIRONMENT = {
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    # What Ray does all the time: a sixth less of it. No statistics of its event loops, which only its own log has;
    # a look for new log files every 2 s instead of ten a second; for the dashboard, at its own memory every minute and
    # at the node's processes every 15 s, instead of every 5 s; and news of tasks every 10 s instead of every second.
    "RAY_event_stats": "0",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "2",
    "METRICS_RECORD_INTERVAL_S": "60",
    "REPORTER_UPDATE_INTERVAL_MS": "15000",
    "RAY_task_events_report_interval_ms": "10000",
}


def main() -> int:
    """Check, run until stopped, and leave nothing running; returns the exit status."""
    config = Path(sys.argv[1] if len(sys.argv) > 1 else "serve_config.yaml")
    try:
        checked = check(config)
    except ValueError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    host, document = checked.host, checked.document
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{shown}:{checked.port}"
    stopping: list[float] = []  # when a signal came
    # Before the start: a signal that is handled here is back at its default in the child, while one that a shell had
    # ignored for a background job would be ignored there too.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stopping.append(time.monotonic()))
    variables = {} if "RAY_ADDRESS" in os.environ else lift_variables(document)
    with tempfile.TemporaryDirectory() as folder:
        if variables:
            config = Path(folder, config.name)
            config.write_text(yaml.safe_dump(document))
        command = [str(Path(sys.executable).with_name("serve")), "run", str(config)]
        # A session of its own: a Ctrl-C then reaches this process alone, which decides what becomes of it.
        child = subprocess.Popen(command, env=NODE_ENVIRONMENT | os.environ | variables, start_new_session=True)
        try:
            watch(child, url, stopping)
            if stopping:
                drain(child.pid, stopping, checked.request_timeout_s)
        finally:
            stop(child)
    return 0 if stopping else 1


def lift_variables(document: dict[str, Any]) -> dict[str, str]:
    """Take the variables out of a config's runtime environments, and return them for the node itself to have.

    Ray starts a worker whose environment is not its node's twice, the first time only to set variables: a second of a
    slow core for each, a tenth of a start. Environments stay where they differ, hold more than variables, or variables
    that Ray would have to expand.
    """
    holders = [document.get("controller_options") or {}, *document["applications"]]
    first, *others = (holder.get("runtime_env") or {} for holder in holders)
    variables = first.get("env_vars") or {}
    are_plain = all(isinstance(value, str) and "$" not in value for value in variables.values())
    if first != {"env_vars": variables} or any(other != first for other in others) or not are_plain:
        return {}
    for holder in holders:
        del holder["runtime_env"]
    return dict(variables)


@dataclass(frozen=True, slots=True)
class Checked:
    """A config that can be served: what it says, where it listens, and the longest that a request may take."""

    document: dict[str, Any]
    host: str
    port: int
    request_timeout_s: float


def check(config: Path) -> Checked:
    """Read a config; raises ValueError with one sentence on what is in the way of a start."""
    try:
        document = yaml.safe_load(config.read_text())
        applications = [app for app in document["applications"] if app["import_path"] == IMPORT_PATH]
    except OSError as error:
        raise ValueError(f"{config} can't be read: {error.strerror}.") from None
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{config} is not a Serve config file: {' '.join(str(error).split())}.") from None
    limits_s = [_check_settings(config, application).request_timeout_s for application in applications]
    if "RAY_ADDRESS" not in os.environ:
        _check_cluster(config)
    options = document.get("http_options") or {}
    host, port = options.get("host", "0.0.0.0"), options.get("port", 8000)
    if not isinstance(port, int):
        raise ValueError(f"{config}: http_options.port is {port!r}, not a number.")
    if reason := _taken(host, port):
        raise ValueError(
            f"port {port} on {host} can't be used ({reason}): stop what holds it, or set http_options.port in {config}."
        )
    runtime = (document.get("controller_options") or {}).get("runtime_env") or {}
    environment = os.environ | (runtime.get("env_vars") or {})
    for name, default in HAPROXY_PORTS.items():
        number = int(environment.get(name, default))
        if environment.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" and (reason := _taken("0.0.0.0", number)):
            raise ValueError(
                f"port {number}, which HAProxy needs for itself, can't be used ({reason}): another service seems to "
                f"run on this machine; stop it, or set {name} in {config}."
            )
    return Checked(document, host, port, max(limits_s, default=0.0))


def _taken(host: str, port: int) -> str | None:
    """Why a port can't be listened on; None if it can."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror
    return None


def _check_settings(config: Path, application: dict[str, Any]) -> Settings:
    try:
        settings = Settings.model_validate(application.get("args") or {})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{config}: args.{place}: {first['msg']}, not {first['input']!r}.") from None
    known = {"Ingress"} | {f"{kind}-{model.slug}" for model in settings.models for kind in ("Tokenizer", "Model")}
    for deployment in application.get("deployments") or []:
        if deployment.get("name") not in known:
            raise ValueError(
                f"{config}: no deployment is called {deployment.get('name')!r}; there are {', '.join(sorted(known))}."
            )
    policy = application.get("autoscaling_policy") or {}
    if policy.get("policy_function") == POLICY:
        try:
            DrainTime(**policy.get("policy_kwargs", {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{config}: autoscaling_policy.policy_kwargs: {error}.") from None
    if settings.keys_file:
        from serve_app.keys import Keys

        Keys(Path(settings.keys_file))
    return settings


def _check_cluster(config: Path) -> None:
    """Of the cluster that `serve run` would join: `ray start` leaves its address in a file, `ray stop` removes it."""
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    try:
        address = file.read_text().strip()
        host, _, port = address.rpartition(":")
        where = (host, int(port))
    except (OSError, ValueError):
        return  # no file, or none that Ray would follow
    try:
        socket.create_connection(where, timeout=1).close()
    except OSError:
        raise ValueError(
            f"the Ray cluster that {file} names ({address}) is gone, and `serve run` would wait for it: delete the "
            "file."
        ) from None
    raise ValueError(
        f"a Ray cluster runs on this machine ({address}), which `serve run` would join: end it with `ray stop`, or "
        f"deploy to it with `serve deploy {config}`."
    )


def watch(child: subprocess.Popen[bytes], url: str, stopping: list[float]) -> None:
    """Wait until the service can embed, and say so of each model once; then wait for a signal or the child's end."""
    started = noticed = time.monotonic()
    said: set[str] = set()
    all_ready = False
    while not stopping and child.poll() is None:
        time.sleep(PARTLY_READY_PERIOD_S if said else POLL_PERIOD_S)
        if all_ready:
            continue
        status, state = _get(f"{url}/readyz")
        if status == 200:
            listed, models = _get(f"{url}/v1/models")
            settled = [name for name, reason in state["models"].items() if reason in SETTLED]
            if listed != 401 and len(models.get("data", [])) < len(settled):
                continue  # another replica of the ingress answered, which does not know of all yet
            all_ready = len(settled) == len(state["models"])
            # What is not ready is said when the first one is: it may never be.
            lines = [line for line in ready_lines(url, state, models) if not said or line.startswith("READY ")]
            for line in lines:
                if line not in said:
                    print(f"{line} ({time.monotonic() - started:.1f} s)", flush=True)
            said.update(lines)
        elif not said and time.monotonic() - noticed > NOTICE_PERIOD_S:
            noticed = time.monotonic()
            reasons = "; ".join(f"{name}: {reason}" for name, reason in state.get("models", {}).items())
            print(f"serve: not ready after {noticed - started:.0f} s: {reasons or 'starting'}", flush=True)
    if not stopping:
        print(f"serve: `serve run` ended with status {child.returncode}", file=sys.stderr)


def ready_lines(url: str, state: dict[str, Any], models: dict[str, Any]) -> list[str]:
    """What is served where, a line a model; and a line for each configured model that is not."""
    lines = [
        f"READY {url}/v1 serves {model['id']} on {model['engine']} {model['precision']} ({model['device']}), weights "
        f"from {model['origin']}"
        for model in models.get("data", [])
    ] or [f"READY {url}/v1 (what it serves needs a key to be listed)"]
    return lines + [f"NOT READY {name}: {reason}" for name, reason in state["models"].items() if reason not in SETTLED]


def _get(url: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON body; (0, {}) while nothing, or nothing of ours, answers."""
    try:
        with urllib.request.urlopen(url, timeout=6) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        try:
            return error.code, json.load(error)
        except ValueError:
            return error.code, {}
    except (OSError, ValueError):
        return 0, {}


if __name__ == "__main__":
    sys.exit(main())
