"""Fuzzer: thousands of damaged inputs, each of which must end in an answer or in one line.

`python -m tests.fuzzing` runs 20,000 seeded inputs over every entry in worker processes, which are
watched for time, memory, sockets, processes and files outside, and prints a row per entry. The exit
code is 1 if any input did what none may do. `--replay ENTRY:INDEX` runs one of them alone and shows
its traceback.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import selectors
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tests.fuzzing.entries import ENTRIES, Entry
from tests.fuzzing.materials import Materials, make_materials
from tests.fuzzing.worker import SECONDS, prepare, run_input

FAILURES = ("traceback", "crash", "hang", "memory", "partial", "unclear")
_GRACE_SECONDS = 5


def main() -> int:
    """Runs the fuzzer; returns the exit code."""
    options = _parse()
    work = options.work or Path(tempfile.mkdtemp(prefix="fuzzing-"))
    (work / "temporary").mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = os.environ["TMPDIR"] = str(work / "temporary")
    entries = [entry for entry in ENTRIES if not options.only or entry.name in options.only]
    targets = tuple(dict.fromkeys(target for entry in entries for target in entry.targets))
    materials = _make(work / "materials", targets, runs=any(entry.runs for entry in entries))
    if options.replay:
        return _replay(options, materials, work)
    _import_everything()
    jobs = _spread(entries, options.n, options.first)
    start = time.monotonic()
    results = _run_all(jobs, options, materials, work)
    failed = _print_table(entries, results)
    seconds = time.monotonic() - start
    print(f"{len(results):,} inputs, seed {options.seed}, {seconds:.0f} s; kept in {work}")
    if options.json:
        rows = [{"entry": e.name, "index": i, **result} for (e, i), result in results.items()]
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 1 if failed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=20_000, help="inputs in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--first", type=int, default=0, help="index of the first input of each entry"
    )
    parser.add_argument("--only", action="append", choices=[entry.name for entry in ENTRIES])
    parser.add_argument(
        "--patience",
        type=float,
        default=1.0,
        help="times the seconds an input may take: a busy host",
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--replay", metavar="ENTRY:INDEX", help="runs one input alone")
    parser.add_argument(
        "--work", type=Path, help="where inputs are made; materials there are used again"
    )
    parser.add_argument("--json", type=Path, help="where every result is written")
    return parser.parse_args()


def _make(root: Path, targets: tuple[str, ...], *, runs: bool) -> Materials:
    """Makes the materials in a child process: its threads would not survive a fork."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            make_materials(root, targets, runs=runs)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit("the valid inputs could not be made")
    return Materials(root)


def _import_everything() -> None:
    """What every worker needs is imported once, before the fork."""
    import torch
    from transformers import (  # noqa: F401  (each is a module, imported when first named)
        AutoImageProcessor,
        AutoModelForImageTextToText,
        AutoTokenizer,
        CLIPVisionModel,
        LlamaForCausalLM,
        LlavaForConditionalGeneration,
        SmolVLMForConditionalGeneration,
    )

    torch.set_num_threads(1)


def _spread(entries: list[Entry], n: int, first: int) -> list[tuple[Entry, int]]:
    whole = sum(entry.weight for entry in entries)
    counts = {entry.name: math.ceil(n * entry.weight / whole) for entry in entries}
    return [(entry, first + i) for entry in entries for i in range(counts[entry.name])]


def _run_all(
    jobs: list[tuple[Entry, int]], options: argparse.Namespace, materials: Materials, work: Path
) -> dict[tuple[Entry, int], dict[str, Any]]:
    """Gives inputs to workers, and a new worker to what the old one did not survive."""
    results: dict[tuple[Entry, int], dict[str, Any]] = {}
    # Interleaved: what is slow is shared, and an early stop has seen every entry.
    shares = [jobs[number :: options.workers] for number in range(options.workers)]
    selector = selectors.DefaultSelector()
    workers = [
        _Worker(share, number, options, materials, work) for number, share in enumerate(shares)
    ]
    for worker in workers:
        worker.start(selector)
    while any(worker.is_alive for worker in workers):
        for key, _ in selector.select(timeout=0.5):
            key.data.receive(results)
        for worker in workers:
            if worker.is_alive:
                worker.watch(results, selector)
    return results


class _Worker:
    """A child process that works through a share of the inputs."""

    def __init__(
        self,
        jobs: list[tuple[Entry, int]],
        number: int,
        options: argparse.Namespace,
        materials: Materials,
        work: Path,
    ) -> None:
        self._jobs = jobs
        self._done = 0
        self._number = number
        self._seed = options.seed
        self._seconds = SECONDS * options.patience
        self._materials = materials
        self._work = work
        self._pid = 0
        self._pipe = -1
        self._text = b""
        self._since = time.monotonic()

    @property
    def is_alive(self) -> bool:
        return self._pid != 0

    def start(self, selector: selectors.BaseSelector) -> None:
        if self._done == len(self._jobs):
            return
        read, write = os.pipe()
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(read)
            self._work_through(write)
        os.close(write)
        self._pipe, self._text, self._since = read, b"", time.monotonic()
        selector.register(read, selectors.EVENT_READ, self)

    def _work_through(self, write: int) -> None:
        code = 1
        try:
            with (self._work / f"output-{self._number}.txt").open("ab") as sink:
                os.dup2(sink.fileno(), 1)
                os.dup2(sink.fileno(), 2)
            prepare(self._work)
            for entry, index in self._jobs[self._done :]:
                result = run_input(
                    entry, index, self._seed, self._materials, self._work, seconds=self._seconds
                )
                os.write(write, json.dumps(result).encode() + b"\n")
            code = 0
        except BaseException:  # noqa: BLE001  (a child that was forked may not return)
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def receive(self, results: dict[tuple[Entry, int], dict[str, Any]]) -> None:
        self._text += os.read(self._pipe, 1 << 16)
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            results[self._jobs[self._done]] = json.loads(line)
            self._done += 1
            self._since = time.monotonic()

    def watch(
        self, results: dict[tuple[Entry, int], dict[str, Any]], selector: selectors.BaseSelector
    ) -> None:
        """Notices an end or a hang; the input that caused it is judged, and the next one begins."""
        hangs = time.monotonic() - self._since > self._seconds + _GRACE_SECONDS
        if hangs:
            os.kill(self._pid, signal.SIGKILL)
        pid, status = os.waitpid(self._pid, 0 if hangs else os.WNOHANG)
        if pid == 0:
            return
        self.receive(results)
        selector.unregister(self._pipe)
        os.close(self._pipe)
        self._pid = 0
        if self._done < len(self._jobs):
            outcome = "hang" if hangs else "crash"
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            detail = f"more than {self._seconds:.0f} s" if hangs else f"the process ended: {number}"
            results[self._jobs[self._done]] = {
                "outcome": outcome,
                "detail": detail,
                "milliseconds": round(1000 * self._seconds),
                "events": [],
            }
            self._done += 1
            self.start(selector)


def _replay(options: argparse.Namespace, materials: Materials, work: Path) -> int:
    """One input in this process, with the traceback of what it raised."""
    name, _, index = options.replay.rpartition(":")
    entry = next(entry for entry in ENTRIES if entry.name == name)
    prepare(work)
    seconds = SECONDS * options.patience
    result = run_input(
        entry, int(index), options.seed, materials, work, seconds=seconds, shows=True
    )
    print(json.dumps(result, indent=1))
    return 0 if result["outcome"] in ("accepted", "refused") and not result["events"] else 1


def _print_table(entries: list[Entry], results: dict[tuple[Entry, int], dict[str, Any]]) -> int:
    columns = ("accepted", "refused", *FAILURES, "socket", "process", "outside")
    print(f"{'entry':<15} {'inputs':>6} " + " ".join(f"{c:>9}" for c in columns) + f" {'ms':>6}")
    failed = 0
    kinds: collections.Counter[tuple[str, str, str]] = collections.Counter()
    example: dict[tuple[str, str, str], int] = {}
    for entry in entries:
        own = {index: result for (e, index), result in results.items() if e is entry}
        counts = collections.Counter(result["outcome"] for result in own.values())
        for index, result in own.items():
            for kind in {event.partition(":")[0] for event in result["events"]}:
                counts[kind] += 1
            for word in (
                *(result["events"]),
                *([result["detail"]] if result["outcome"] in FAILURES else []),
            ):
                key = (entry.name, result["outcome"], word[:150])
                kinds[key] += 1
                example.setdefault(key, index)
        failed += sum(counts[column] for column in columns[2:])
        middle = sum(result["milliseconds"] for result in own.values()) / max(len(own), 1)
        row = " ".join(f"{counts[column]:>9}" for column in columns)
        print(f"{entry.name:<15} {len(own):>6} {row} {middle:>6.0f}")
    for key, count in kinds.most_common():
        print(f"{count:>5} x {key[0]}:{example[key]}  {key[1]}: {key[2]}")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
