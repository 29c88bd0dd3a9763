"""What memory and energy a phase of an answer takes: up to its first token, and after it.

Both are read where a stage ends, in time that no stage is charged with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

from pocketvlm.device_bench.block import AnswerTimes
from pocketvlm.device_bench.runner.sensors.energy import EnergyCounter
from pocketvlm.device_bench.runner.sensors.memory import MemoryCounter
from pocketvlm.reports.measurement import Energy, Memory
from pocketvlm.runtime.answer import StageClock

__all__ = ["EnergyMeter", "MemoryMeter", "PhaseClock"]


class PhaseClock(StageClock):
    """A clock that says which stage has ended."""

    def __init__(self, on_stage: Callable[[str], None]) -> None:
        super().__init__()
        self._on_stage = on_stage

    def lap(self, stage: str) -> None:
        """Counts the time since the last lap towards a stage."""
        super().lap(stage)
        self._on_stage(stage)
        self.skip()


@dataclass
class MemoryMeter:
    """Peaks of a process by phase.

    Attributes:
        counter: Counts this process and those that run programs for it.
        before_load: Memory before the bundle was opened, in the fields `after_*`.
    """

    counter: MemoryCounter | None
    before_load: Memory
    _after_load: Memory = field(default_factory=Memory)
    _peaks: dict[str, int] = field(default_factory=dict)
    _can_forget: bool = True
    _is_prefill: bool = True

    def end_load(self) -> None:
        """The graphs are ready."""
        self._after_load = snapshot(self.counter)
        self._take("load")

    def begin_turn(self) -> None:
        """A turn begins."""
        self._is_prefill = True

    def end_stage(self, stage: str) -> None:
        """A stage of a turn has ended; the first text ends its first phase."""
        if stage == "detokenize" and self._is_prefill:
            self._is_prefill = False
            self._take("prefill")

    def end_turn(self) -> None:
        """A turn has ended."""
        self._take("decode")

    def memory(self) -> Memory:
        """Everything that was found."""
        after = snapshot(self.counter)
        known = self._peaks if self._can_forget else {}
        return Memory(
            counter=None if self.counter is None else self.counter.name,
            before_load_rss_bytes=self.before_load.after_rss_bytes,
            before_load_pss_bytes=self.before_load.after_pss_bytes,
            after_load_rss_bytes=self._after_load.after_rss_bytes,
            after_load_pss_bytes=self._after_load.after_pss_bytes,
            peak_prefill_rss_bytes=known.get("prefill"),
            peak_decode_rss_bytes=known.get("decode"),
            peak_rss_bytes=max(self._peaks.values(), default=None),
            after_rss_bytes=after.after_rss_bytes,
            after_pss_bytes=after.after_pss_bytes,
        )

    def _take(self, phase: str) -> None:
        """Notes the peak since the last time, if the system tells phases apart, or so far."""
        peak = None if self.counter is None else self.counter.peak_bytes()
        if self.counter is None or peak is None:
            return
        self._peaks[phase] = max(peak, self._peaks.get(phase, 0))
        self._can_forget = self.counter.forget_peak() and self._can_forget


def snapshot(counter: MemoryCounter | None) -> Memory:
    """Memory now, in the two `after` fields."""
    if counter is None:
        return Memory()
    return Memory(
        after_rss_bytes=counter.resident_bytes(), after_pss_bytes=counter.shared_out_bytes()
    )


@dataclass
class EnergyMeter:
    """Energy of answers; those that are not counted are let pass.

    Attributes:
        counter: Counts the whole system; `None` where nothing does.
    """

    counter: EnergyCounter | None
    _phases_j: dict[str, float] = field(default_factory=dict)
    _last_j: float | None = None
    _turns: list[AnswerTimes] = field(default_factory=list)
    _seconds: float = 0.0
    _started: float = 0.0
    _phase: str = "prompt"
    _pictures: int = 0
    _is_whole: bool = True

    def begin_turn(self) -> None:
        """A turn that counts begins."""
        self._phase = "prompt"
        self._started = perf_counter()
        self._last_j = None if self.counter is None else self.counter.read_j()

    def end_stage(self, stage: str) -> None:
        """A stage of a turn has ended; pictures, prompt and decoding are told apart."""
        if self.counter is None or not self.counter.is_fine:
            return
        if stage == "vision":
            self._take("picture")
            self._pictures += 1
        elif stage == "detokenize" and self._phase == "prompt":
            self._take("prompt")
            self._phase = "decode"

    def end_turn(self, times: AnswerTimes) -> None:
        """A turn that counts has ended."""
        if self.counter is not None:
            self._take(self._phase)
            self._seconds += perf_counter() - self._started
            self._turns.append(times)

    def energy(self, *, answers: int, pictures: int) -> Energy | None:
        """What was counted; `None` if nothing was, or the counter stopped.

        Args:
            answers: Answers that were counted.
            pictures: Pictures in them.
        """
        if self.counter is None or not self._turns or not self._is_whole:
            return None
        total_j = sum(self._phases_j.values())
        new_tokens = sum(turn.new_tokens for turn in self._turns)
        is_fine = self.counter.is_fine
        decoded = new_tokens - len(self._turns) if is_fine else new_tokens
        spent_j = self._phases_j.get("decode", 0.0) if is_fine else total_j
        picture_j = self._phases_j.get("picture")
        return Energy(
            counter=self.counter.name,
            scope=self.counter.scope,
            total_j=total_j,
            seconds=self._seconds,
            answers=answers,
            new_tokens=new_tokens,
            pictures=pictures,
            mj_per_token=spent_j / decoded * 1e3 if decoded else None,
            j_per_image=picture_j / self._pictures if picture_j and self._pictures else None,
            is_by_stage=is_fine,
        )

    def _take(self, phase: str) -> None:
        now = None if self.counter is None else self.counter.read_j()
        if now is None or self._last_j is None:
            self._is_whole = False
            return
        self._phases_j[phase] = self._phases_j.get(phase, 0.0) + now - self._last_j
        self._last_j = now
