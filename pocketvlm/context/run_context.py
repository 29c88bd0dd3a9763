"""RunContext: what a stage may know about its run; passed, never global."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pocketvlm.bundle import VisualSchedule
from pocketvlm.context.ranks import ALONE, Ranks
from pocketvlm.weights.layout import LayerBytes

__all__ = [
    "PrefillTimes",
    "Progress",
    "ProgressCallback",
    "RunContext",
    "derive_seed",
    "ignore_progress",
]

PrefillTimes = Callable[[str, Sequence[tuple[int, int]], VisualSchedule | None], float]
"""Predicted mean milliseconds of prefill: of a device, for prompts of some rows of text and some
visual rows, under a schedule. Raises `InputError` where the device is not known, and `RecipeError`
where its speed is not."""


def derive_seed(seed: int, label: str) -> int:
    """The seed of one of a run's random streams, below 2**63.

    Every label has its own stream: leaving one out, or changing the order, changes no other.
    """
    digest = hashlib.sha256(f"{seed} {label}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One step of long work.

    Attributes:
        task: What is going on, such as `gptq decoder`.
        done: Steps finished.
        total: Steps in all, or 0 if unknown.
        note: The last step in a few words, such as a layer's name and its error.
    """

    task: str
    done: int
    total: int
    note: str = ""


ProgressCallback = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """The default callback, which does nothing."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Seed, threads, scratch space and progress of one run.

    Attributes:
        seed: Every random choice of a stage derives from it.
        threads: Threads that numeric kernels may use.
        scratch_dir: Where a stage may keep finished layers, so that a killed run resumes; `None`
            keeps nothing. The folder belongs to one stage of one run: its name holds a hash of
            everything that the stage's result depends on.
        source_dir: Directory of the model that the run started from, for stages that learn from it;
            `None` if unknown.
        layer_bytes: What a layer takes in the files of each target, by the target's tag, for
            stages that solve under a budget of bytes.
        device: Where stages compute, as torch names it; weights and states stay in main memory and
            in files.
        ranks: The processes that share the run; a stage that shares nothing is given none.
        prefill_times: What prefill takes, for stages that solve under a budget of time; `None`
            where what will be exported is not known.
        on_progress: Called from the working thread after each step.
    """

    seed: int = 0
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    scratch_dir: Path | None = None
    source_dir: Path | None = None
    layer_bytes: Mapping[str, LayerBytes] = field(default_factory=dict)
    device: str = "cpu"
    ranks: Ranks = ALONE
    prefill_times: PrefillTimes | None = None
    on_progress: ProgressCallback = ignore_progress

    def report(self, task: str, done: int, total: int, note: str = "") -> None:
        """Reports that `done` of `total` steps of `task` are finished."""
        self.on_progress(Progress(task=task, done=done, total=total, note=note))

    def with_scratch(self, scratch_dir: Path | None) -> RunContext:
        """The same context with another scratch folder."""
        return replace(self, scratch_dir=scratch_dir)

    def alone(self) -> RunContext:
        """The same context for work that is not shared."""
        return replace(self, ranks=ALONE)
