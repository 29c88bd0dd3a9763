"""Made-up blocks and answers."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.arm import pair_all
from pocketvlm.device_bench.block import AnswerTimes, Block, SensorSample
from pocketvlm.device_bench.controller.bench import bench_bundles
from pocketvlm.device_bench.controller.prompts import fit_turns
from pocketvlm.device_bench.controller.shown import show_pictures
from pocketvlm.device_bench.protocol import (
    BlockJob,
    EnvironmentJob,
    Failure,
    Job,
    Result,
    SensorsJob,
)
from pocketvlm.device_bench.transports.base import (
    Connection,
    EventCallback,
    Transport,
    ignore_event,
)
from pocketvlm.device_bench.workload import Workload
from pocketvlm.json_io import encode
from pocketvlm.reports.measurement import Measurement, Memory, Prompt

__all__ = ["SCRIPTED", "ScriptedTransport", "bench", "block_job", "make_answer", "make_block"]

SCRIPTED = Workload(name="tiny", image_size=64, prompt_tokens=48, new_tokens=5)
"""What the blocks of `make_block` are answers to."""


def make_answer(scale: float = 1.0) -> AnswerTimes:
    """An answer whose stages take round times, multiplied by `scale`."""
    return AnswerTimes(
        preprocess_ms=10.0 * scale,
        vision_ms=40.0 * scale,
        tokenize_ms=1.0 * scale,
        embed_ms=1.0 * scale,
        prefill_ms=20.0 * scale,
        decode_ms=(2.0 * scale,) * 4,
        sample_ms=(0.5 * scale,) * 5,
        detokenize_ms=(0.5 * scale,) * 5,
        ttft_user_ms=73.0 * scale,
        ttft_engine_ms=20.5 * scale,
        decode_span_ms=12.0 * scale,
        prompt_tokens=40,
        new_tokens=5,
    )


def make_block(scale: float = 1.0, *, token_ids: tuple[int, ...] = (1, 2, 3)) -> Block:
    """The measurement of one worker process."""
    return Block(
        load_ms=100.0 * scale,
        prompt=Prompt(text_tokens=32, visual_tokens=8, tokens=40),
        cold=make_answer(2 * scale),
        answers=(make_answer(scale),),
        memory=Memory(
            before_load_rss_bytes=50_000_000,
            after_load_rss_bytes=60_000_000,
            peak_rss_bytes=70_000_000,
        ),
        token_ids=(token_ids,),
        is_repeatable=True,
    )


def block_job(bundle: Path, workload: Workload) -> BlockJob:
    """The job of one process."""
    pictures, opened = workload.encoded_pictures(), Bundle.open(bundle)
    shown = show_pictures(opened, pictures, workload.vision)
    return BlockJob(
        bundle=str(bundle),
        runtime="onnx",
        turns=fit_turns(opened, workload, shown),
        vision=workload.vision,
        new_tokens=workload.new_tokens,
        answers=workload.answers,
        pictures=tuple(base64.b64encode(one).decode() for one in pictures),
    )


@dataclass
class ScriptedTransport(Transport, Connection):
    """A device with scripted outcomes."""

    kind: ClassVar[str] = "scripted"
    has_real_time: ClassVar[bool] = False

    outcomes: list[Any]
    environment: Any = field(default_factory=lambda: {"threads": 1})
    sensors: list[SensorSample] = field(default_factory=list)
    is_gone_after: int | None = None
    jobs: list[BlockJob] = field(default_factory=list)

    def connect(self) -> Self:
        return self

    def install(self, bundle: Bundle) -> str:
        return str(bundle.path)

    def close(self) -> None:
        pass

    def run(
        self, job: Job, *, timeout_s: float, on_event: EventCallback = ignore_event
    ) -> Result | Failure:
        if isinstance(job, EnvironmentJob):
            is_gone = self.is_gone_after is not None and len(self.jobs) >= self.is_gone_after
            return Failure(reason="no route to host") if is_gone else self.environment
        if isinstance(job, SensorsJob):
            return encode(self.sensors.pop(0))
        self.jobs.append(job)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return encode(outcome) if isinstance(outcome, Block) else outcome


def bench(bundles: Sequence[Path], workload: Workload = SCRIPTED, **options: Any) -> Measurement:
    """The measurement of one workload."""
    (result,) = bench_bundles(pair_all(bundles), [workload], **options)
    return result
