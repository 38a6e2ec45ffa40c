"""The end of a service, where HAProxy does not answer."""

import subprocess
import time
from pathlib import Path

import pytest

from serve_app.session import SAME_SIGNAL_S, drain


def test_a_stop_that_learnt_nothing_from_haproxy_does_not_say_that_all_was_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, config = tmp_path / "haproxy", tmp_path / "haproxy.cfg"
    program.write_text("#!/bin/sh\nread _\n")  # runs until its stdin is closed
    program.chmod(0o755)
    config.write_text(f"global\n  stats socket {tmp_path / 'admin.sock'} mode 600\n")  # where nobody listens
    command = [str(program), "-f", str(config)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
        while Path(f"/proc/{process.pid}/comm").read_text().strip() != "haproxy":
            time.sleep(0.01)
        now = time.monotonic()
        drain(process.pid, [now - 2 * SAME_SIGNAL_S, now], timeout_s=30)
    assert capsys.readouterr().err == "serve: ended with an unknown number of requests unanswered\n"
