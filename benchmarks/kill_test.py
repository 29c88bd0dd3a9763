"""Kills runs at random moments and damages what they leave; the results must not differ by a bit.

```bash
python benchmarks/kill_test.py --kills 50 --flips all --work /tmp/kills
```

First every recipe runs undisturbed. Then a run of it is started and killed, at a moment and by a
signal that the seed draws, and started again until it ends; every file of its checkpoint and bundle
is compared with the undisturbed one. A killed process must have printed its line and no traceback,
and left no process. Finally a run is killed half way, and for each file in its folder a copy of
the folder, with one bit of that file flipped, is resumed and compared.

A quarter of the kills come before work begins, to processes started as users start them. The others
are forked from this one, which has imported the libraries already: importing them takes longer
than the work on a small model.

Not compared are `report.*`, the bundle's `README.md` and `log.jsonl`, which hold timings.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from itertools import count, cycle
from pathlib import Path
from random import Random

import psutil

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP)
LINE = "interrupted; the same command resumes where this one stopped"
UNCOMPARED = ("README.md", "report.html")

HEAD = """schema: 1
name: {name}
calibration: {{source: reference, samples: 6}}
targets: [{{method: onnx, accuracy_level: 0, tower_accuracy_level: 0}}]
stages:
"""
STAGES = {
    "gradients": """
  - {method: prune, score: {kind: gblm}, ratio: 0.5, update: regression}
  - {method: reduce_tokens, keep: 0.5}
  - {method: distill, steps: 6, batch_size: 2, check_every: 2}
  - {method: gptq, rules: [{match: '.*', bits: 4, group_size: 32}]}
""",
    "blocks": """
  - {method: prune_depth, decoder_blocks: 1, tower_blocks: 1}
  - {method: awq, rules: [{match: '.*', bits: 4, group_size: 32}]}
  - method: mixed
    average_bits: 5
    samples: 2
    options: [{bits: 4, group_size: 32}, {bits: 8, group_size: 32}]
""",
    "tables": """
  - {method: prune_width, ffn_ratio: 0.25}
  - method: prune
    score: {kind: wanda}
    ratio: 0.3
    allocation: {kind: ecoflap, order: zeroth}
  - {method: codebook, rules: [{match: '.*', index_bits: 4, vector_length: 1}]}
""",
}


@dataclass
class Counts:
    """What happened, in all."""

    kills: Counter[str] = field(default_factory=Counter)
    after_work_began: int = 0
    finished: int = 0
    flipped: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One recipe, undisturbed."""

    name: str
    recipe: Path
    arguments: tuple[str, ...]
    expected: dict[str, bytes]
    startup_s: float
    work_s: float

    def start(self, out: Path, *, forked: bool = True) -> Attempt:
        """Starts the run in a folder."""
        return Attempt(self.recipe, out, self.arguments, forked=forked)


class Attempt:
    """A run in a folder, as a process; what it says on stderr goes to a file beside the folder."""

    def __init__(
        self, recipe: Path, out: Path, arguments: tuple[str, ...], *, forked: bool
    ) -> None:
        self._log = out.with_suffix(".stderr")
        self.returncode: int | None = None
        words = ["compress", *arguments, "--recipe", str(recipe), "--out", str(out)]
        sys.stdout.flush()  # or the forked process would write it as well
        with self._log.open("wb") as log:
            self.pid = os.fork()
            if self.pid == 0:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                if not forked:
                    os.execv(sys.executable, [sys.executable, "-m", "pocketvlm", *words])  # noqa: S606  (our own program)
                from pocketvlm.cli import main

                sys.argv = ["pocketvlm", *words]
                main()

    def poll(self) -> int | None:
        """The exit status, negative for the signal that ended it; `None` while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def finish(self) -> str:
        """Waits for its end; returns what it said."""
        while self.poll() is None:
            time.sleep(0.01)
        return self._log.read_text(encoding="utf-8", errors="replace")

    def kill(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)


def has_begun(out: Path) -> bool:
    """Whether a stage of the run keeps something."""
    return any(out.glob(".work/*/layers/*")) or any(out.glob(".work/*/finished.json"))


def run_undisturbed(name: str, work: Path, arguments: tuple[str, ...]) -> Trial:
    """Runs a recipe once, and measures how long it takes."""
    recipe = work / f"{name}.yaml"
    recipe.write_text(HEAD.format(name=name) + STAGES[name].lstrip("\n"), encoding="utf-8")
    out = work / f"{name}-undisturbed"
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    process = Attempt(recipe, out, arguments, forked=False)
    startup = 0.0
    while process.poll() is None:
        if not startup and has_begun(out):
            startup = time.monotonic() - began
        time.sleep(0.02)
    said = process.finish()
    if process.returncode != 0:
        raise SystemExit(f"{name}: the undisturbed run ended with {process.returncode}: {said}")
    total = time.monotonic() - began
    print(f"{name:<10} undisturbed: {startup:.1f} s to the first kept result, {total:.1f} s in all")
    return Trial(
        name=name,
        recipe=recipe,
        arguments=arguments,
        expected=results(out),
        startup_s=startup,
        work_s=total - startup,
    )


def results(out: Path) -> dict[str, bytes]:
    """Content of every file that must not depend on how often a run was started."""
    files = [out / "recipe.yaml", out / "run.json"]
    for folder in ("checkpoint", "bundle"):
        files += sorted(path for path in (out / folder).rglob("*") if path.is_file())
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in files
        if path.name not in UNCOMPARED
    }


def compare(trial: Trial, out: Path) -> list[str]:
    """Names of files that differ from the undisturbed run's, or are in one of both alone."""
    found = results(out)
    names = sorted(trial.expected.keys() | found.keys())
    return [name for name in names if trial.expected.get(name) != found.get(name)]


def kill_once(trial: Trial, out: Path, random: Random, number: int, counts: Counts) -> bool:
    """Starts a run, or resumes one, and kills it; returns whether it ended before that."""
    is_resumed = has_begun(out)
    is_early = random.random() < 0.25
    process = trial.start(out, forked=not is_early)
    if is_early:
        deadline = time.monotonic() + random.uniform(0, trial.startup_s)
    else:
        while process.poll() is None and not has_begun(out):
            time.sleep(0.01)
        # What is resumed loads its model first, which takes a part of the start.
        span = 0.6 * trial.work_s + (trial.startup_s / 2 if is_resumed else 0)
        deadline = time.monotonic() + random.uniform(0, span)
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    if process.poll() is None:
        counts.after_work_began += has_begun(out)
        counts.kills[signal.Signals(number).name] += 1
        moment = "at work" if has_begun(out) else "before work began"
        print(f"{trial.name:<10} {signal.Signals(number).name} {moment}", flush=True)
        process.kill(number)
    said = process.finish()
    where = f"{trial.name}, {signal.Signals(number).name}"
    if process.returncode == 0:
        return True
    if "Traceback" in said:
        counts.faults.append(f"{where}: a traceback: {said[-300:]}")
    if number == signal.SIGKILL:
        if process.returncode != -number:
            counts.faults.append(f"{where}: ended with {process.returncode}: {said[-300:]}")
    elif process.returncode == -number:
        counts.kills["before Python could answer"] += 1
    elif process.returncode != 128 + number or said.splitlines()[-1:] != [LINE]:
        counts.faults.append(f"{where}: ended with {process.returncode}, said {said[-300:]!r}")
    counts.faults += [f"{where}: left process {left}" for left in left_behind(out)]
    return False


def left_behind(out: Path) -> Iterator[int]:
    """Processes that still name a run's folder, after two seconds of grace."""
    deadline = time.monotonic() + 2
    while True:
        found = [
            process.pid
            for process in psutil.process_iter(["cmdline"])
            if process.pid != psutil.Process().pid
            and any(str(out) in word for word in process.info["cmdline"] or ())
        ]
        if not found or time.monotonic() > deadline:
            yield from found
            return
        time.sleep(0.1)


def check_end(trial: Trial, out: Path, what: str, counts: Counts) -> None:
    """Compares a finished run, and removes its folder."""
    counts.finished += 1
    differing = compare(trial, out)
    if differing:
        counts.faults.append(f"{trial.name}, {what}: {', '.join(differing)} differ")
    else:
        shutil.rmtree(out)


def flip_bits(trial: Trial, work: Path, random: Random, limit: int | None, counts: Counts) -> None:
    """Kills a run half way, and resumes copies of it in which one bit of one file is flipped."""
    half = work / f"{trial.name}-half"
    shutil.rmtree(half, ignore_errors=True)
    process = trial.start(half)
    # Half of the stages are done, and the next one has kept some of its layers.
    done = (trial.recipe.read_text(encoding="utf-8").count("method: ") - 1) // 2
    while process.poll() is None:
        finished = list(half.glob(".work/*/finished.json"))
        kept = [path for path in half.glob(".work/*/layers/*") if path.suffix != ".partial"]
        own = {path.parent for path in finished}
        if len(finished) >= done and sum(path.parents[1] not in own for path in kept) >= 4:
            break
        time.sleep(0.01)
    process.kill(signal.SIGKILL)
    process.finish()
    names = sorted(path.relative_to(half) for path in half.rglob("*") if path.is_file())
    print(f"{trial.name:<10} half-finished folder: {len(names)} files", flush=True)
    for name in names if limit is None else random.sample(names, min(limit, len(names))):
        out = work / f"{trial.name}-flipped"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(half, out)
        content = bytearray((out / name).read_bytes() or b"\0")
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        (out / name).write_bytes(content)
        process = trial.start(out)
        said = process.finish()
        counts.flipped += 1
        if process.returncode != 0:
            counts.faults.append(f"{trial.name}, {name} flipped: {said[-300:]}")
        else:
            check_end(trial, out, f"{name} flipped", counts)
        if counts.flipped % 10 == 0:
            print(
                f"{trial.name:<10} {counts.flipped} flipped, faults {len(counts.faults)}",
                flush=True,
            )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="reference:pocket-llava")
    parser.add_argument("--recipes", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--flips", default="0", help="files of each half-finished run, or all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "kill-test")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    arguments = (options.model, "--no-bench", "--data", "reference:1", "--n", "4", "--threads", "1")
    for module in ("pocketvlm.pipeline.job", "transformers", "onnxruntime"):
        import_module(module)
    random, counts = Random(options.seed), Counts()
    trials = [run_undisturbed(name, options.work, arguments) for name in options.recipes]
    signals = cycle(SIGNALS)
    turns = cycle(trials)
    while options.kills and sum(counts.kills[one.name] for one in SIGNALS[1:]) < options.kills:
        trial = next(turns)
        out = options.work / f"{trial.name}-killed"
        shutil.rmtree(out, ignore_errors=True)
        for attempt in count():
            if kill_once(trial, out, random, next(signals), counts):
                check_end(trial, out, f"killed {attempt} times", counts)
                break
            # A run that is killed again and again must end some day: eight times, then in peace.
            killed = sum(counts.kills[one.name] for one in SIGNALS[1:])
            if attempt == 7 or killed >= options.kills:
                process = trial.start(out)
                said = process.finish()
                if process.returncode != 0:
                    counts.faults.append(f"{trial.name}: does not end: {said[-300:]}")
                else:
                    check_end(trial, out, f"killed {attempt + 1} times", counts)
                break
        print(f"{trial.name:<10} {dict(counts.kills)}, faults {len(counts.faults)}", flush=True)
    limit = None if options.flips == "all" else int(options.flips)
    for trial in trials if limit != 0 else ():
        flip_bits(trial, options.work, random, limit, counts)
    print(
        json.dumps(
            {
                "kills": dict(counts.kills),
                "after_work_began": counts.after_work_began,
                "finished_and_compared": counts.finished,
                "files_with_a_flipped_bit": counts.flipped,
                "faults": counts.faults,
            },
            indent=2,
        )
    )
    sys.exit(1 if counts.faults else 0)


if __name__ == "__main__":
    main()
