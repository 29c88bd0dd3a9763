"""One block: this process loads one bundle, answers, and times every stage of every answer.

What is timed is the runtime's own `Conversation`, over whichever engine runs the bundle, with two
differences: generation continues after an end token if the job says so, and memory and energy are
read where stages end, in time that no stage is charged with.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from PIL.Image import Image

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.block import AnswerTimes, Block, SensorSample, SustainedAnswer
from pocketvlm.device_bench.protocol import AnswerEvent, AnswerKind, BlockJob, LoadedEvent
from pocketvlm.device_bench.runner.phases import EnergyMeter, MemoryMeter, PhaseClock, snapshot
from pocketvlm.device_bench.runner.sensors.energy import find_energy_counter
from pocketvlm.device_bench.runner.sensors.memory import find_memory_counter
from pocketvlm.device_bench.runner.sensors.reading import read_sensors
from pocketvlm.device_bench.transports.base import EventCallback, ignore_event
from pocketvlm.errors import InputError
from pocketvlm.image_file import read_image
from pocketvlm.reports.measurement import Energy, Prompt
from pocketvlm.runtime.answer import Answer, StageClock
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.engines import open_engine
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.runtime.runner import Runner
from pocketvlm.runtime.text import Message, TextCodec, assistant_message, user_message

__all__ = ["measure_block"]

_PICTURE = "the workload's picture"
_SENSOR_PERIOD_S = 5.0
# A token that is part of a character comes back as U+FFFD, whose three bytes may be three tokens.
_ROWS_PER_PAST_TOKEN = 3


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """One turn of an answer."""

    times: AnswerTimes
    token_ids: tuple[int, ...]
    visual_tokens: int


def measure_block(job: BlockJob, threads: int, *, on_event: EventCallback = ignore_event) -> Block:
    """Loads a bundle and measures the workload on it, in this process.

    Args:
        job: The bundle and the workload. The bundle's digests are not checked, because that is not
            part of loading.
        threads: Threads of the heavy graphs.
        on_event: Called once all graphs are ready, for every turn of an answer, and for every
            sample of the sensors.

    Raises:
        BundleError: The bundle cannot be loaded.
        InputError: A picture cannot be read, or an answer does not fit the model.
    """
    log = _Log(on_event=on_event)
    before_load = snapshot(find_memory_counter([os.getpid()]))
    log.sample_sensors()
    clock = StageClock()
    bundle = Bundle.open(Path(job.bundle), verify=False)
    codec = TextCodec.from_bundle(bundle)
    clock.lap("load")
    rows = _most_rows(job, bundle, codec)
    clock.skip()
    runner = _open(bundle, job.runtime, threads, rows)
    conversation = Conversation(bundle, runner=runner, codec=codec)
    clock.lap("load")
    load_ms = sum(clock.laps("load"))
    children = [child.pid for child in psutil.Process().children(recursive=True)]
    memory = MemoryMeter(find_memory_counter([os.getpid(), *children]), before_load)
    memory.end_load()
    on_event(LoadedEvent(load_ms=load_ms))
    log.sample_sensors()
    energy = EnergyMeter(find_energy_counter())
    bench = _Bench(job=job, conversation=conversation, memory=memory, energy=energy, log=log)

    cold = bench.answer("cold")
    for _ in range(job.warm_ups - 1):
        bench.answer("warm_up")
    measured = []
    for _ in range(job.answers):
        measured.append(bench.answer("measured"))
        log.sample_sensors()
    sustained_at_ms = log.at_ms() if job.sustained_s else None
    sustained = bench.sustain(job.sustained_s) if job.sustained_s else ()
    log.sample_sensors()
    first, *later = zip(*measured, strict=True)
    token_ids = tuple(turn.token_ids for turn in cold)
    message = user_message(job.turns[0].text, images=len(job.turns[0].pictures))
    text_tokens = sum(token != codec.image_token_id for token in codec.encode([message]))
    return Block(
        load_ms=load_ms,
        prompt=Prompt(
            text_tokens=text_tokens,
            visual_tokens=cold[0].visual_tokens,
            tokens=cold[0].times.prompt_tokens,
        ),
        cold=cold[0].times,
        answers=tuple(turn.times for turn in first),
        later_turns=tuple(tuple(turn.times for turn in turns) for turns in later),
        sustained=sustained,
        sustained_at_ms=sustained_at_ms,
        sensors=tuple(log.sensors),
        memory=memory.memory(),
        energy=bench.counted_energy(),
        token_ids=token_ids,
        is_repeatable=all(
            tuple(turn.token_ids for turn in answer) == token_ids for answer in measured
        ),
    )


@dataclass(kw_only=True)
class _Log:
    """What is said while things happen, timed from the start of this process's job."""

    on_event: EventCallback
    sensors: list[SensorSample] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def at_ms(self) -> float:
        """Milliseconds since the start."""
        return (time.monotonic() - self.started) * 1e3

    def sample_sensors(self, *, period_s: float = 0.0) -> None:
        """Reads the sensors unless the last sample is younger than a period."""
        now = self.at_ms()
        if not self.sensors or now - self.sensors[-1].at_ms >= period_s * 1e3:
            self.sensors.append(read_sensors(now))
            self.on_event(self.sensors[-1])


@dataclass(kw_only=True)
class _Bench:
    """A loaded bundle with the workload that it answers."""

    job: BlockJob
    conversation: Conversation
    memory: MemoryMeter
    energy: EnergyMeter
    log: _Log
    counted: int = 0

    def answer(
        self, kind: AnswerKind, on_turn: Callable[[int, _Turn], None] = lambda _, __: None
    ) -> tuple[_Turn, ...]:
        """One answer, turn by turn, from an empty cache."""
        counts = kind in ("measured", "sustained")
        self.conversation.reset()
        turns = []
        for number in range(len(self.job.turns)):
            turn = self._ask(number, counts=counts)
            self.log.on_event(
                AnswerEvent(kind=kind, turn=number, at_ms=self.log.at_ms(), times=turn.times)
            )
            on_turn(number, turn)
            turns.append(turn)
        self.counted += counts
        return tuple(turns)

    def sustain(self, seconds: float) -> tuple[SustainedAnswer, ...]:
        """Answers without a pause; the last one ends after the time is over."""
        started = time.monotonic()
        answers: list[SustainedAnswer] = []

        def keep(number: int, turn: _Turn) -> None:
            times = turn.times
            answers.append(
                SustainedAnswer(
                    at_s=time.monotonic() - started,
                    turn=number,
                    ttft_user_ms=times.ttft_user_ms,
                    prefill_ms=times.prefill_ms,
                    decode_span_ms=times.decode_span_ms,
                    prompt_tokens=times.prompt_tokens,
                    new_tokens=times.new_tokens,
                )
            )

        while time.monotonic() - started < seconds:
            self.answer("sustained", keep)
            self.log.sample_sensors(period_s=_SENSOR_PERIOD_S)
        return tuple(answers)

    def counted_energy(self) -> Energy | None:
        """Energy of the answers that count."""
        pictures = sum(len(turn.pictures) for turn in self.job.turns)
        return self.energy.energy(answers=self.counted, pictures=pictures * self.counted)

    def _ask(self, number: int, *, counts: bool) -> _Turn:
        job, turn = self.job, self.job.turns[number]
        images = [base64.b64decode(job.pictures[index]) for index in turn.pictures]

        def end_stage(stage: str) -> None:
            self.memory.end_stage(stage)
            if counts:
                self.energy.end_stage(stage)

        self.memory.begin_turn()
        if counts:
            self.energy.begin_turn()
        clock = PhaseClock(end_stage)
        stream = self.conversation.stream(
            turn.text,
            images,
            vision=job.vision,
            max_new_tokens=job.new_tokens,
            ignore_end=job.ignore_eos,
            clock=clock,
        )
        for _ in stream:
            pass
        self.memory.end_turn()
        answer = self.conversation.answers[-1]
        times = _times(clock, answer)
        if counts:
            self.energy.end_turn(times)
        if answer.stop_reason == "capacity":
            raise InputError(
                f"turn {number + 1} ended after {times.new_tokens} of {job.new_tokens} tokens, "
                "where the model or its KV cache had no more room: ask for fewer"
            )
        return _Turn(
            times=times,
            token_ids=answer.token_ids,
            visual_tokens=answer.timings.visual_tokens,
        )


def _times(clock: StageClock, answer: Answer) -> AnswerTimes:
    """The times of a turn; what ended the text counts towards its last token."""
    sample, detokenize = clock.laps("sample"), clock.laps("detokenize")
    if len(detokenize) > 1:
        detokenize = (*detokenize[:-2], detokenize[-2] + detokenize[-1])
    (prefill_ms,) = clock.laps("prefill")
    before = [sum(clock.laps(stage)) for stage in ("preprocess", "vision", "tokenize", "embed")]
    sees = bool(clock.laps("vision"))
    decode = clock.laps("decode")
    return AnswerTimes(
        preprocess_ms=before[0] if sees else None,
        vision_ms=before[1] if sees else None,
        tokenize_ms=before[2] if sees else before[0] + before[2],
        embed_ms=before[3],
        prefill_ms=prefill_ms,
        decode_ms=decode,
        sample_ms=sample,
        detokenize_ms=detokenize,
        ttft_user_ms=sum(before) + prefill_ms + sample[0] + detokenize[0],
        ttft_engine_ms=prefill_ms + sample[0],
        decode_span_ms=sum(decode) + sum(sample[1:]) + sum(detokenize[1:]),
        prompt_tokens=answer.timings.prompt_tokens,
        new_tokens=len(sample),
        reused_tokens=answer.timings.reused_tokens,
    )


def _most_rows(job: BlockJob, bundle: Bundle, codec: TextCodec) -> int:
    """Rows of KV cache that the conversation may take, its answers written back included.

    Raises:
        InputError: A picture cannot be read.
    """
    shown: list[Image] = []
    messages: list[Message] = []
    for turn in job.turns:
        pictures = [base64.b64decode(job.pictures[index]) for index in turn.pictures]
        shown += [read_image(picture, _PICTURE) for picture in pictures]
        messages += [user_message(turn.text, images=len(pictures)), assistant_message("a")]
    grids = ImagePreprocessor.from_bundle(bundle).grids(shown)
    manifest = bundle.manifest
    full = (manifest.visual_tokens_full, *(one.visual_tokens_full for one in manifest.variants))
    past = _ROWS_PER_PAST_TOKEN * job.new_tokens * (len(job.turns) - 1)
    ids = codec.encode(messages[:-1], grids, counts=[max(full)] * len(grids))
    return len(ids) + past + job.new_tokens


def _open(bundle: Bundle, runtime: str, threads: int, rows: int) -> Runner:
    """The engine that runs a target here, none of which is an emulator.

    Raises:
        UnsupportedError: Core ML is asked for, and this is not an Apple machine.
    """
    if runtime != "coreml":
        return open_engine(bundle, runtime, threads=threads, rows=rows)
    from pocketvlm.runtime.coreml.apple import AppleToolkit, DevicePackage
    from pocketvlm.runtime.coreml.runner import CoremlRunner

    toolkit = AppleToolkit("ALL")
    return CoremlRunner(bundle, open_package=lambda path: DevicePackage(path, toolkit))
