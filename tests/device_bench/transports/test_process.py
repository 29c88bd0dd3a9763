"""Processes that behave badly, and output that is none of the protocol's."""

from __future__ import annotations

import json
import sys
import time
import tracemalloc

import pytest

from pocketvlm.device_bench.protocol import PROTOCOL, EnvironmentJob, Failure, LoadedEvent
from pocketvlm.device_bench.transports.host import HostTransport
from pocketvlm.device_bench.transports.output import RunnerOutput
from pocketvlm.device_bench.transports.process import converse

OK = json.dumps({"schema": PROTOCOL, "status": "ok", "result": {"answer": 42}})
LOADED = '{"event": "loaded", "load_ms": 12.5}'


def run(program: str, timeout_s: float = 60.0):
    with HostTransport(command=(sys.executable, "-c", program)).connect() as connection:
        return connection.run(EnvironmentJob(), timeout_s=timeout_s)


def test_a_grandchild_that_keeps_the_output_open_is_not_waited_for():
    program = (
        "import subprocess, sys;"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
        "                 start_new_session=True);"
        f"print('''{OK}''')"
    )
    started = time.monotonic()
    assert run(program) == {"answer": 42}
    assert time.monotonic() - started < 30


def test_a_grandchild_that_prints_without_end_is_not_waited_for():
    program = f"import os, subprocess, sys;print('''{OK}''', flush=True);subprocess.Popen(['yes'])"
    started = time.monotonic()
    assert isinstance(run(program), Failure)  # its last line is not the runner's
    assert time.monotonic() - started < 30


def test_garbage_is_read_within_bounds():
    """What a runner prints is not kept, however much it is and with or without lines."""
    output = RunnerOutput(longest_line_bytes=2**16)
    lines = (b"loading {tensor} \xff\xfe\x00\x1b[2J " * 40 + b"\n") * 64
    line = b"\xff" * len(lines)
    tracemalloc.start()
    for _ in range(100):
        output.feed(lines)
        output.feed(line)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 100 * 2 * len(lines) > 12e6
    assert peak < 1e6
    output.feed(b"\n" + OK.encode())
    assert output.outcome(0, "") == {"answer": 42}


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_lines_are_put_together_from_any_pieces(size):
    heard = []
    output = RunnerOutput(heard.append)
    text = f"noise\r\n{LOADED}\r\n\n{LOADED}\nnoise \xe9\n{OK}\r\n".encode("latin-1")
    for start in range(0, len(text), size):
        output.feed(text[start : start + size])
    assert output.outcome(0, "") == {"answer": 42}
    assert heard == [LoadedEvent(load_ms=12.5)] * 2


def test_events_without_end_are_refused():
    output = RunnerOutput(most_event_bytes=1000)
    for _ in range(100):
        output.feed(LOADED.encode() + b"\n")
    output.feed(OK.encode())
    outcome = output.outcome(0, "")
    assert isinstance(outcome, Failure)
    assert outcome.reason == "the runner sent more than 1000 bytes of events"
    assert len(outcome.events) < 30


def test_a_result_that_is_too_long_is_none():
    output = RunnerOutput(longest_line_bytes=10)
    output.feed(OK.encode())
    outcome = output.outcome(0, "")
    assert isinstance(outcome, Failure)
    assert outcome.reason == (
        "the runner ended with status 0 and no result: a line of more than 10 bytes"
    )


def test_a_reason_is_one_line_that_steers_no_terminal():
    output = RunnerOutput()
    outcome = output.outcome(3, "a\nb \x1b[2J\u202e\n")
    assert isinstance(outcome, Failure)
    assert outcome.reason == r"the runner ended with status 3 and no result: b \x1b[2J\u202e"


def test_a_runner_that_prints_nothing_for_long_is_waited_for():
    assert run(f"import time; time.sleep(2); print('''{OK}''')") == {"answer": 42}


def test_the_limit_is_of_a_clock_that_nobody_sets(monkeypatch):
    monkeypatch.setattr(time, "time", iter(range(0, 10**9, 10**6)).__next__)
    assert run(f"import time; time.sleep(0.5); print('''{OK}''')") == {"answer": 42}


def test_a_runner_that_closes_its_output_is_still_ended():
    started = time.monotonic()
    outcome = run("import os, time; os.close(1); os.close(2); time.sleep(60)", timeout_s=1)
    assert isinstance(outcome, Failure)
    assert outcome.reason == "no result within 1 s"
    assert time.monotonic() - started < 30


def test_what_is_not_read_is_not_an_error():
    ended = converse(
        (sys.executable, "-c", "import os; os.close(0); print('x')"),
        (b"x" * 2**20 for _ in range(8)),
        lambda _: None,
        timeout_s=60,
    )
    assert ended.status == 0


def test_a_process_that_takes_nothing_has_stalled():
    ended = converse(
        (sys.executable, "-c", "import time; time.sleep(60)"),
        (b"x" * 2**20 for _ in range(8)),
        lambda _: None,
        timeout_s=60,
        stall_s=0.5,
    )
    assert ended.status is None
    assert ended.stalled


def test_much_is_written_and_read_at_once():
    """A child that answers while it reads would block both sides, if they took turns."""
    read = bytearray()
    ended = converse(("cat",), (bytes([i]) * 2**20 for i in range(8)), read.extend, timeout_s=60)
    assert ended.status == 0
    assert bytes(read) == b"".join(bytes([i]) * 2**20 for i in range(8))
