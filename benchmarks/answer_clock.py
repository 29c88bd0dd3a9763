"""The clock of answers: time that passes, or processor time where a machine is shared."""

from __future__ import annotations

import argparse
import time

from pocketvlm.runtime import answer

__all__ = ["add_clock", "set_clock"]


def add_clock(parser: argparse.ArgumentParser) -> None:
    """Adds `--clock`, which goes with `--threads`."""
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")


def set_clock(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Has this process, and the answers of its runtimes, measured by the clock of `options`."""
    if options.clock == "cpu":
        if options.threads != 1:
            parser.error("--clock cpu adds up threads; it needs --threads 1")
        time.perf_counter = time.process_time
        answer.perf_counter = time.process_time  # type: ignore[attr-defined]  # not its own
