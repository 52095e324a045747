import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rewarm.rollouts.sandbox import Outcome, Sandbox

NUMBER = "tests.rollouts.unsafe.make_number"


def children(pid):
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text() if Path(f"/proc/{pid}").exists() else ""
    direct = [int(child) for child in text.split()]
    return direct + [grandchild for child in direct for grandchild in children(child)]


def gone(pids, seconds=5.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        if not any(s.exists() and s.read_text().rpartition(")")[2].split()[0] != "Z" for s in states):
            return True
        time.sleep(0.05)
    return False


def test_ctrl_c_is_not_for_the_workers():
    with Sandbox(NUMBER, num_workers=1) as sandbox:
        sandbox.map(["a"])
        pids = [sandbox._process.pid, *children(sandbox._process.pid)]
        assert os.getpgid(pids[0]) != os.getpgid(0)
        for pid in pids:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(pid, number)
        assert sandbox.map(["a"]) == [Outcome(1)]


PROGRAM = """
import sys, time
from rewarm.rollouts.sandbox import Sandbox
sandbox = Sandbox("tests.rollouts.unsafe.make_run", num_workers=2)
sandbox.map(["value = 1"] * 20)
print("up", flush=True)
sandbox.map(["while True: pass"] * 4, timeout=100)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_the_one_that_started_it(number):
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, cwd=root) as trainer:
        assert trainer.stdout.readline() == b"up\n"
        time.sleep(0.3)
        started = children(trainer.pid)
        assert len(started) >= 2
        os.kill(trainer.pid, number)
        assert gone([*started, trainer.pid], seconds=10)
