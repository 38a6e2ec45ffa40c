"""One process's part in a run, beside its users: it collects their requests, and where it leads, records and judges."""

import itertools
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gevent
import locust
from locust import events, runners
from locust.env import Environment
from locust.runners import WorkerRunner

from loadtest.traffic import report, serve_api
from loadtest.traffic.kinds import KINDS
from loadtest.traffic.objectives import Limits
from loadtest.traffic.recorder import Collector, Recorder
from loadtest.traffic.run import Replicas, Writer
from loadtest.traffic.users import EmbeddingUser, Service

LINE_PERIOD_S = 5
BUSY = (
    "The load's own processes were at the limit of a core, so latencies are partly theirs: take more processes "
    "(--processes), or fewer users."
)
BROKEN = "Users of the load test itself broke down, so that the run says little: the errors are in its output."


class Session:
    """What one process does beside its users: collect their requests, and where it leads the run, write and judge."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._collector = Collector()
        self._leads = not isinstance(environment.runner, WorkerRunner)
        self._recorder: Recorder | None = None
        events.test_start.add_listener(self.on_start)
        events.request.add_listener(self._collector.on_request)
        if self._leads:
            events.worker_report.add_listener(self.on_worker_report)
            events.test_stop.add_listener(self.on_stop)
            events.quitting.add_listener(self.finish)
        else:
            events.report_to_master.add_listener(self.on_report)

    def on_start(self, **_: Any) -> None:
        """A run begins, in this process too."""
        options = self._environment.parsed_options
        host = self._environment.host
        EmbeddingUser.service = Service(host, options.api_key, options.model or None, options.pacing == "paced")
        EmbeddingUser.numbers = itertools.count()
        if not self._leads:
            return
        self.finish()  # one before, of the web page
        self._dashboard = options.dashboard or serve_api.dashboard_beside(host)
        # The token opens the whole cluster, so it goes to a dashboard that was named, or to this machine's.
        trusted = options.dashboard or serve_api.is_here(self._dashboard)
        self._token = os.environ.get("RAY_AUTH_TOKEN") if trusted else None
        self._untold = ""
        started = time.time()
        about = {
            "version": 1,
            "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started)),
            "url": host,
            "shape": options.shape,
            "duration_s": options.run_time,
            "users": options.num_users,
            "kinds": [kind for kind in KINDS if kind in {user.kind.name for user in self._environment.user_classes}],
            "pacing": options.pacing,
            "workers": self._environment.runner.worker_count,
            "locust": locust.__version__,
            "limits": asdict(Limits(options.p99_ms, options.error_rate, options.min_rate)),
        }
        name = time.strftime("%Y%m%d-%H%M%S", time.localtime(started))
        self._writer = Writer(Path(options.out) / f"{name}-{options.shape}.jsonl.gz", about)
        self._recorder = Recorder(self._writer, started)
        self._watch = gevent.spawn(self._look, self._recorder)

    def _look(self, recorder: Recorder) -> None:
        for second in itertools.count(1):
            gevent.sleep(1.0 - time.time() % 1.0)
            recorder.add(self._collector.take())
            users = self._environment.runner.user_count
            recorder.sample(time.time(), users, self._replicas(recorder))
            if second % LINE_PERIOD_S == 0:
                print(recorder.line(time.time(), users), flush=True)

    def _replicas(self, recorder: Recorder) -> dict[str, Replicas] | None:
        try:
            return serve_api.ask(self._dashboard, self._token)
        except serve_api.Untold as error:
            note = f"Replicas are not known: Ray's dashboard at {self._dashboard} doesn't tell ({error})."
            if note != self._untold:
                self._untold = note
                recorder.note(note)
            return None

    def on_report(self, data: dict[str, Any], **_: Any) -> None:
        """A worker's report to the master takes the requests along."""
        data["taken"] = self._collector.take()

    def on_worker_report(self, data: dict[str, Any], **_: Any) -> None:
        """The master's side of that."""
        if self._recorder is not None:
            self._recorder.add(data["taken"])

    def on_stop(self, **_: Any) -> None:
        """The users are gone; of a run from the web page the last reports still come."""
        self._watch.kill()
        gevent.spawn_later(3 * runners.WORKER_REPORT_INTERVAL, self.finish)

    def finish(self, **_: Any) -> None:
        """Write the last lines and the report, say what was met, and set the exit status."""
        if self._recorder is None:
            return
        recorder, self._recorder = self._recorder, None
        self._watch.kill()  # unless the run has stopped before
        recorder.add(self._collector.take())
        runner = self._environment.runner
        if runner.cpu_warning_emitted or runner.worker_cpu_warning_emitted:
            recorder.note(BUSY)
        if runner.exceptions:
            recorder.note(BROKEN)
        self._writer.close()
        met = report.write(self._writer.file)
        self._environment.process_exit_code = 0 if met and not runner.exceptions else 1
