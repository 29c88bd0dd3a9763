"""The runner on a simulated device: the lines that it prints as simulated time passes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from pocketvlm.device_bench.block import AnswerTimes, Block, SensorSample, SustainedAnswer
from pocketvlm.device_bench.protocol import (
    AnswerEvent,
    AnswerKind,
    BlockJob,
    LoadedEvent,
    write_event,
    write_result,
)
from pocketvlm.device_bench.transports.simulation import Fault, Simulation
from pocketvlm.json_io import encode
from pocketvlm.reports.measurement import Memory, Prompt

__all__ = ["BreakError", "SimulatedProcess", "read_sensors"]


class BreakError(Exception):
    """A fault that ends the process."""

    def __init__(self, fault: Fault) -> None:
        """It is this one."""
        super().__init__(fault.kind)
        self.fault = fault


@dataclass(kw_only=True)
class SimulatedProcess:
    """One process on the device, which measures one bundle.

    Attributes:
        script: The device.
        job: What it measures.
        noise: Where the noise comes from.
        worked_s: Seconds that the device has worked, which decide how warm it is.
        faults: Those of this process.
        at_ms: The clock of the process.
        answered: How many conversations are complete.
        samples: What the sensors said.
    """

    script: Simulation
    job: BlockJob
    noise: random.Random
    worked_s: float
    faults: list[Fault]
    at_ms: float = 0.0
    answered: int = 0
    samples: list[SensorSample] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """What the runner prints, line by line.

        Raises:
            BreakError: The script ends the process, or the connection to it.
        """
        job = self.job
        load_ms = self._time(self.script.load_ms)
        self._work(load_ms)
        yield write_event(LoadedEvent(load_ms=load_ms))
        cold: list[AnswerTimes] = []
        measured: list[list[AnswerTimes]] = []
        sustained: list[SustainedAnswer] = []
        for index in range(job.warm_ups + job.answers):
            kind: AnswerKind = "measured" if index >= job.warm_ups else "warm_up"
            kind = kind if index else "cold"
            turns = cold if kind == "cold" else []
            yield from self._conversation(kind, turns)
            if kind == "measured":
                measured.append(turns)
        began_s = self.worked_s
        while self.worked_s - began_s < (job.sustained_s or 0.0):
            turns = []
            yield from self._conversation("sustained", turns)
            sustained += [
                SustainedAnswer(
                    at_s=self.worked_s - began_s,
                    turn=number,
                    ttft_user_ms=times.ttft_user_ms,
                    prefill_ms=times.prefill_ms,
                    decode_span_ms=times.decode_span_ms,
                    prompt_tokens=times.prompt_tokens,
                    new_tokens=times.new_tokens,
                )
                for number, times in enumerate(turns)
            ]
        yield write_result(encode(self._block(load_ms, cold, measured, sustained)))

    def _conversation(self, kind: AnswerKind, turns: list[AnswerTimes]) -> Iterator[str]:
        for fault in [one for one in self.faults if one.after_answers == self.answered]:
            self.faults.remove(fault)
            if fault.kind == "garbage":
                yield from fault.lines
            elif fault.kind == "clock_jump":
                self.at_ms += fault.jump_ms
            else:
                raise BreakError(fault)
        for number, turn in enumerate(self.job.turns):
            times = self._answer(kind, len(turn.pictures), turns)
            turns.append(times)
            event = AnswerEvent(kind=kind, turn=number, at_ms=self.at_ms, times=times)
            yield write_event(event)
            self.samples.append(read_sensors(self.script, self.worked_s, self.at_ms))
            yield write_event(self.samples[-1])
        self.answered += 1

    def _answer(self, kind: AnswerKind, pictures: int, earlier: list[AnswerTimes]) -> AnswerTimes:
        stages, new_tokens = self.script.stages, self.job.new_tokens
        scale = self.script.cold_slower if kind == "cold" else 1.0
        one = {
            name: self._time(value * scale)
            for name, value in encode(stages).items()
            if not name.startswith(("decode", "sample", "detokenize"))
        }
        sample_ms = tuple(self._time(stages.sample_ms * scale) for _ in range(new_tokens))
        text_ms = tuple(self._time(stages.detokenize_ms * scale) for _ in range(new_tokens))
        decode_ms = tuple(self._time(stages.decode_ms * scale) for _ in range(new_tokens - 1))
        preprocess_ms = one["preprocess_ms"] * pictures if pictures else None
        vision_ms = one["vision_ms"] * pictures if pictures else None
        ttft_engine_ms = one["prefill_ms"] + sample_ms[0]
        before_ms = (preprocess_ms or 0) + (vision_ms or 0) + one["tokenize_ms"] + one["embed_ms"]
        span_ms = sum(decode_ms) + sum(sample_ms[1:]) + sum(text_ms[1:])
        times = AnswerTimes(
            preprocess_ms=preprocess_ms,
            vision_ms=vision_ms,
            tokenize_ms=one["tokenize_ms"],
            embed_ms=one["embed_ms"],
            prefill_ms=one["prefill_ms"],
            decode_ms=decode_ms,
            sample_ms=sample_ms,
            detokenize_ms=text_ms,
            ttft_user_ms=before_ms + ttft_engine_ms + text_ms[0],
            ttft_engine_ms=ttft_engine_ms,
            decode_span_ms=span_ms,
            prompt_tokens=self.script.text_tokens + pictures * self.script.visual_tokens,
            new_tokens=new_tokens,
            reused_tokens=sum(turn.prompt_tokens + turn.new_tokens for turn in earlier),
        )
        self._work(times.ttft_user_ms + span_ms)
        return times

    def _block(
        self,
        load_ms: float,
        cold: list[AnswerTimes],
        measured: list[list[AnswerTimes]],
        sustained: list[SustainedAnswer],
    ) -> Block:
        first, script = self.job.turns[0], self.script
        visual_tokens = len(first.pictures) * script.visual_tokens
        peak = script.peak_rss_bytes
        return Block(
            load_ms=load_ms,
            prompt=Prompt(
                text_tokens=script.text_tokens,
                visual_tokens=visual_tokens,
                tokens=cold[0].prompt_tokens,
            ),
            cold=cold[0],
            answers=tuple(turns[0] for turns in measured),
            later_turns=tuple(zip(*(turns[1:] for turns in measured), strict=True)),
            sustained=tuple(sustained),
            sensors=tuple(self.samples),
            memory=Memory(
                counter="VmHWM",
                before_load_rss_bytes=peak // 8,
                after_load_rss_bytes=peak // 2,
                peak_prefill_rss_bytes=peak,
                peak_decode_rss_bytes=peak,
                peak_rss_bytes=peak,
                after_rss_bytes=peak // 2,
            ),
            token_ids=tuple(tuple(range(self.job.new_tokens)) for _ in self.job.turns),
            is_repeatable=True,
        )

    def _time(self, cool_ms: float) -> float:
        name = self.job.bundle.rpartition("/")[2]
        slower = self.script.heat_at(self.worked_s).slower * self.script.slower.get(name, 1.0)
        return cool_ms * slower * max(0.01, self.noise.gauss(1.0, self.script.noise))

    def _work(self, duration_ms: float) -> None:
        self.at_ms += duration_ms
        self.worked_s += duration_ms / 1e3


def read_sensors(script: Simulation, worked_s: float, at_ms: float) -> SensorSample:
    """The device's sensors after some seconds of work."""
    heat = script.heat_at(worked_s)
    return SensorSample(
        at_ms=at_ms, temperature_c=heat.temperature_c, thermal_status=heat.thermal_status
    )
