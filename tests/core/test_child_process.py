from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from pocketvlm.child_process import module_command, start_child

CHILD = "import time; from pocketvlm.child_process import end_with_parent; end_with_parent(); "
PARENT = f"""
import sys
from pocketvlm.child_process import start_child
with start_child([sys.executable, "-c", {CHILD!r} + "time.sleep(60)"]) as child:
    print(child.pid, flush=True)
    child.wait()
"""


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for_end(pid):
    deadline = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform == "win32", reason="no parents to ask for")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_with_its_parent(number):
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.send_signal(number)
    parent.communicate()
    wait_for_end(child)


def test_a_child_that_is_left_is_ended():
    with (
        pytest.raises(KeyboardInterrupt),
        start_child([sys.executable, "-c", "import time; time.sleep(60)"]) as child,
    ):
        raise KeyboardInterrupt
    assert child.returncode == -signal.SIGKILL


def test_a_child_that_ends_says_how():
    command = [sys.executable, "-c", CHILD + "print('said'); raise SystemExit(3)"]
    with start_child(command, stdout=subprocess.PIPE) as child:
        said, _ = child.communicate()
    assert (said, child.returncode) == ("said\n", 3)


def test_a_module_of_the_current_folder_is_found_only_where_the_parent_finds_it(
    tmp_path, monkeypatch
):
    (tmp_path / "foreign.py").write_text("print('ran')")
    monkeypatch.chdir(tmp_path)
    for path, code in ((["/nowhere"], 1), (["", "/nowhere"], 0), ([str(tmp_path)], 0)):
        monkeypatch.setattr(sys, "path", path)
        done = subprocess.run(module_command("foreign"), capture_output=True, check=False)
        assert done.returncode == code
