"""Made-up blocks and answers."""

from __future__ import annotations

import base64
from pathlib import Path

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.block import AnswerTimes, Block
from pocketvlm.device_bench.prompts import fit_turns
from pocketvlm.device_bench.protocol import BlockJob
from pocketvlm.device_bench.workload import Workload
from pocketvlm.reports.measurement import Memory, Prompt

__all__ = ["block_job", "make_answer", "make_block"]


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
        prompt=Prompt(text_sha256="0", text_tokens=32, visual_tokens=8, tokens=40),
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
    pictures = workload.encoded_pictures()
    return BlockJob(
        bundle=str(bundle),
        runtime="onnx",
        turns=fit_turns(Bundle.open(bundle), workload, pictures),
        new_tokens=workload.new_tokens,
        answers=workload.answers,
        pictures=tuple(base64.b64encode(one).decode() for one in pictures),
    )
