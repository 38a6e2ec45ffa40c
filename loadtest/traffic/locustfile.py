"""`locust -f loadtest/traffic/locustfile.py`: what Locust finds here, users, shape and options.

Locust's own options hold, too: `--headless`, `--host`, `--users`, `--run-time`, `--processes`, `--master`, `--worker`,
and names of user classes to have only those.
"""

import logging
import socket
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from locust import LoadTestShape, events, runners
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

from loadtest.traffic.kinds import KINDS
from loadtest.traffic.objectives import parse_p99
from loadtest.traffic.session import Session
from loadtest.traffic.shapes import SHAPES, users_at
from loadtest.traffic.users import Autocomplete, Indexer, Mixed, OpenAI, Rag

__all__ = ["Autocomplete", "Indexer", "Load", "Mixed", "OpenAI", "Rag"]  # what Locust finds here

RUNS = Path(__file__).parents[1] / "runs"
SPAWN_PER_S = 100  # the most that Locust does without a warning
# How long users may take at the end for the requests that they have under way.
DRAIN_S = 30
runners.WORKER_REPORT_INTERVAL = 1.0


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """The options beside Locust's own, and other defaults for those."""
    defaults = {kind.name: kind.p99_ms for kind in KINDS.values()}
    parser.set_defaults(num_users=20, run_time=60, stop_timeout=DRAIN_S)
    parser.add_argument("--shape", choices=list(SHAPES), default="steps", help="how the number of users changes")
    parser.add_argument(
        "--pacing",
        choices=["closed", "paced"],
        default="closed",
        help="closed: a user pauses after an answer; paced: asks on time, and latency counts from then",
    )
    parser.add_argument(
        "--p99-ms",
        type=lambda text: _parse_p99(text, defaults),
        default="",
        metavar="KIND=MS,...",
        include_in_web_ui=False,
        help="objectives for the p99 of each kind of user, over " + ",".join(f"{k}={v:g}" for k, v in defaults.items()),
    )
    parser.add_argument("--error-rate", type=float, default=0.001, help="share of requests that may be refused")
    parser.add_argument("--min-rate", type=float, default=10.0, help="right answers/s that there must be, on average")
    parser.add_argument("--model", default="", help="the model to ask for; the first one that is served if not given")
    parser.add_argument("--api-key", default="", env_var="OPENAI_API_KEY", is_secret=True, help="where one is needed")
    parser.add_argument("--dashboard", default="", help="Ray's dashboard, for the replicas; on the host's port 8265")
    parser.add_argument("--out", default=str(RUNS), help="folder for records and reports")


def _parse_p99(text: str, defaults: dict[str, float]) -> dict[str, float]:
    try:
        return parse_p99(text, defaults)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


class Load(LoadTestShape):
    """The shape that was asked for; at its end nobody asks any more, and what is under way is waited for."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        options = self.runner.environment.parsed_options
        elapsed_s = self.get_run_time()
        if elapsed_s < options.run_time:
            return users_at(options.shape, elapsed_s, options.run_time, options.num_users), SPAWN_PER_S
        if self.get_current_user_count() and elapsed_s < options.run_time + DRAIN_S:
            return 0, SPAWN_PER_S
        return None


@events.init.add_listener
def on_init(environment: Environment, **_: Any) -> None:
    """Locust has its options and its runner."""
    # Its own tables say the same once more, without the replicas.
    logging.getLogger("locust.stats_logger").setLevel(logging.WARNING)
    options = environment.parsed_options
    if options.headless and not options.worker:
        if not environment.host:
            sys.exit("load: --host is missing: the URL of the service.")
        _require_listener(environment.host)
    Session(environment)


def _require_listener(url: str) -> None:
    where = urlsplit(url)
    try:
        port = where.port or {"http": 80, "https": 443}[where.scheme]
        socket.create_connection((where.hostname, port), timeout=5).close()
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"load: nothing answers at {url} ({type(error).__name__}): start the service, or name another URL.")
