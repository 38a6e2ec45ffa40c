"""The short form of `make chaos`, for real: replicas and a node are killed under load, and what is promised holds."""

import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.chaos.faults import FAULTS, SHORT
from tests.service.conftest import ROOT, Keeper

pytestmark = pytest.mark.service

# It takes three minutes; on a machine that was busy 280 s were not enough. What is promised has limits of its own.
TIMEOUT_S = 600
# Half of what is usual: on a machine half as fast the usual load alone takes both cores, and nothing can recover.
RATE = 40


def test_what_is_promised_holds_while_processes_are_killed(keeper: Keeper, tmp_path: Path) -> None:
    keeper.stop()  # the machine is not large enough for two
    file = tmp_path / "faults.md"
    command = [sys.executable, "-m", "loadtest.chaos", "--short", "--rate", str(RATE), "--output", str(file)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-4000:]
    written = file.read_text()
    for name in SHORT:
        assert f"| {FAULTS[name].words} | 1 | {FAULTS[name].promise.words}" in written
    assert "**no**" not in written
    assert not Path("/tmp/ray/ray_current_cluster").exists()
