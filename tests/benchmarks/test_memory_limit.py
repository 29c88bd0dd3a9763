"""A control group of a benchmark leaves nothing behind, however its command or its script ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.memory_limit import limited, remove_group

ROOT = Path("/sys/fs/cgroup")
PARENT = ROOT / "memory" if (ROOT / "memory").is_dir() else ROOT
pytestmark = pytest.mark.skipif(
    not os.access(PARENT, os.W_OK) or Path("/run/systemd/system").exists(),
    reason="control groups of this machine are not ours to make",
)
LIMIT = 200_000_000
WAITING = f"""
import time
from benchmarks.memory_limit import limited
with limited({LIMIT}):
    print("in", flush=True)
    time.sleep(600)
"""


def groups() -> set[Path]:
    return set(PARENT.glob("pocketvlm-*"))


def test_a_command_that_takes_more_is_killed_and_its_group_removed() -> None:
    before = groups()
    with limited(LIMIT) as prefix:
        hungry = [sys.executable, "-c", f"x = bytearray({2 * LIMIT})"]
        assert subprocess.run([*prefix, *hungry], check=False).returncode == -signal.SIGKILL
        modest = [sys.executable, "-c", "print(1)"]
        assert subprocess.run([*prefix, *modest], check=False).returncode == 0
        assert len(groups() - before) == 1
    assert groups() <= before


def test_what_still_runs_is_killed_with_the_group() -> None:
    with limited(LIMIT) as prefix:
        process = subprocess.Popen([*prefix, "sleep", "600"])
        (group,) = (each for each in groups() if each.name.endswith(f"-{os.getpid()}"))
        while str(process.pid) not in (group / "cgroup.procs").read_text().split():
            time.sleep(0.01)
    assert process.wait(10) == -signal.SIGKILL
    assert not group.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_script_that_is_stopped_leaves_no_group(number: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True
    ) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "in\n"
        group = PARENT / f"pocketvlm-{script.pid}"
        assert group.is_dir()
        script.send_signal(number)
    assert group.is_dir() == (number == signal.SIGKILL)  # which no process sees
    with limited(LIMIT):
        assert not group.exists()


def test_a_group_that_is_left_can_be_removed() -> None:
    group = PARENT / "pocketvlm-left"
    group.mkdir()
    with limited(LIMIT):
        assert group.is_dir()  # of no process, so not one of ours
    remove_group(group)
    assert not group.exists()
