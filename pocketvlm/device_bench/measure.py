"""One block: this process loads one bundle, answers, and times every stage of every answer.

It calls the parts of the runtime in the order in which the runtime does, with three differences:
generation continues after an end token, the picture is given as encoded bytes, and embedding the
prompt is timed separately from prefill, so that one answer gives both times to first token.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.block import AnswerTimes, Block
from pocketvlm.device_bench.protocol import AnswerEvent, AnswerKind, BlockJob, LoadedEvent
from pocketvlm.device_bench.transports.base import EventCallback, ignore_event
from pocketvlm.errors import InputError
from pocketvlm.image_file import read_image
from pocketvlm.machine import peak_rss_bytes, process_peak_bytes
from pocketvlm.models.images.tilings import TileGrid
from pocketvlm.reports.measurement import Memory, Prompt
from pocketvlm.runtime.answer import StageClock
from pocketvlm.runtime.detokenize import TextStream
from pocketvlm.runtime.engines import open_engine
from pocketvlm.runtime.generate import StopRules, generate, prompt_rows
from pocketvlm.runtime.onnx.runner import OnnxRunner
from pocketvlm.runtime.picture_rows import PictureRows
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.runtime.runner import Runner
from pocketvlm.runtime.splice import VisualFeatures, lay_out_prompt
from pocketvlm.runtime.text import Message, TextCodec, user_message

__all__ = ["measure_block"]

_PICTURE = "the workload's picture"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Loaded:
    """A loaded bundle with the workload that it answers."""

    bundle: Bundle
    codec: TextCodec
    preprocessor: ImagePreprocessor
    rows: PictureRows
    runner: Runner
    job: BlockJob
    messages: Sequence[Message]
    images: Sequence[bytes]


def measure_block(job: BlockJob, threads: int, *, on_event: EventCallback = ignore_event) -> Block:
    """Loads a bundle and measures the workload on it, in this process.

    Args:
        job: The bundle and the workload. The bundle's digests are not checked, because that is not
            part of loading.
        threads: Threads of the heavy graphs.
        on_event: Called once all graphs are ready, and for every answer.

    Raises:
        BundleError: The bundle cannot be loaded.
        InputError: A picture cannot be read, or the job has turns that this runner cannot measure.
    """
    if len(job.turns) != 1:
        raise InputError(f"the job has {len(job.turns)} turns; this runner measures one")
    started = time.monotonic()
    before_bytes = _rss_bytes()
    clock = StageClock()
    bundle = Bundle.open(Path(job.bundle), verify=False)
    codec = TextCodec.from_bundle(bundle)
    preprocessor = ImagePreprocessor.from_bundle(bundle)
    clock.lap("load")
    (turn,) = job.turns
    images = [base64.b64decode(job.pictures[index]) for index in turn.pictures]
    messages = [user_message(turn.text, images=len(images))]
    grids = [preprocessor.grid(read_image(image, _PICTURE)) for image in images]
    full = bundle.manifest.visual_tokens_full
    prompt = codec.encode(messages, grids)
    clock.skip()
    runner = _open(bundle, job.runtime, threads, len(prompt) + job.new_tokens)
    clock.lap("load")
    loaded = _Loaded(
        bundle=bundle,
        codec=codec,
        preprocessor=preprocessor,
        rows=PictureRows.from_bundle(bundle),
        runner=runner,
        job=job,
        messages=messages,
        images=images,
    )
    after_bytes = _rss_bytes()
    load_ms = sum(clock.laps("load"))
    on_event(LoadedEvent(load_ms=load_ms))

    def answer(kind: AnswerKind) -> tuple[AnswerTimes, tuple[int, ...]]:
        times, ids = _answer(loaded)
        at_ms = (time.monotonic() - started) * 1e3
        on_event(AnswerEvent(kind=kind, turn=0, at_ms=at_ms, times=times))
        return times, ids

    cold, token_ids = answer("cold")
    for _ in range(job.warm_ups - 1):
        answer("warm_up")
    measured = [answer("measured") for _ in range(job.answers)]
    placeholders = sum(grid.placeholders(full) for grid in grids)
    text_tokens = sum(token != codec.image_token_id for token in codec.encode(messages))
    return Block(
        load_ms=load_ms,
        prompt=Prompt(
            text_sha256=hashlib.sha256(turn.text.encode()).hexdigest(),
            text_tokens=text_tokens,
            visual_tokens=cold.prompt_tokens - (len(prompt) - placeholders),
            tokens=cold.prompt_tokens,
        ),
        cold=cold,
        answers=tuple(times for times, _ in measured),
        memory=Memory(
            before_load_rss_bytes=before_bytes,
            after_load_rss_bytes=after_bytes,
            peak_rss_bytes=_peak_bytes(),
        ),
        token_ids=(token_ids,),
        is_repeatable=all(ids == token_ids for _, ids in measured),
    )


def _answer(loaded: _Loaded) -> tuple[AnswerTimes, tuple[int, ...]]:
    """One answer from an empty cache."""
    runner, codec, manifest = loaded.runner, loaded.codec, loaded.bundle.manifest
    stream = TextStream(codec.decode_raw)
    runner.reset()
    pictures: list[VisualFeatures] = []
    grids: list[TileGrid] = []
    clock = StageClock()
    for image in loaded.images:
        picture = read_image(image, _PICTURE)
        pixels = loaded.preprocessor.pixels(picture)
        clock.lap("preprocess")
        grids.append(loaded.preprocessor.grid(picture))
        pictures += loaded.rows.encode(runner, pixels, grids[-1])
        clock.lap("vision")
    layout = lay_out_prompt(
        codec.encode(loaded.messages, grids),
        pictures,
        image_token_id=codec.image_token_id,
        keeps_positions=manifest.positions == "original",
        grid=manifest.position_grid,
    )
    clock.lap("tokenize")
    rows = prompt_rows(layout, pictures, runner, mutual_rows=manifest.kv_cache.mutual_rows)
    clock.lap("embed")
    stop = StopRules(
        max_new_tokens=loaded.job.new_tokens,
        end_token_ids=() if loaded.job.ignore_eos else codec.eos_token_ids,
    )
    token_ids: list[int] = []
    ttft_user_ms = 0.0
    for token in generate(runner, rows, stop, lap=clock.lap):
        token_ids.append(token)
        stream.push(token)
        clock.lap("detokenize")
        ttft_user_ms = ttft_user_ms or clock.total()
    sample_ms = clock.laps("sample")
    (prefill_ms,) = clock.laps("prefill")
    times = AnswerTimes(
        preprocess_ms=sum(clock.laps("preprocess")) if pictures else None,
        vision_ms=sum(clock.laps("vision")) if pictures else None,
        tokenize_ms=sum(clock.laps("tokenize")),
        embed_ms=sum(clock.laps("embed")),
        prefill_ms=prefill_ms,
        decode_ms=clock.laps("decode"),
        sample_ms=sample_ms,
        detokenize_ms=clock.laps("detokenize"),
        ttft_user_ms=ttft_user_ms,
        ttft_engine_ms=prefill_ms + sample_ms[0],
        decode_span_ms=clock.total() - ttft_user_ms,
        prompt_tokens=len(layout.codes),
        new_tokens=len(token_ids),
    )
    return times, tuple(token_ids)


def _open(bundle: Bundle, runtime: str, threads: int, rows: int) -> Runner:
    """The engine; ONNX Runtime's cache has no more rows than needed."""
    if runtime == "onnx":
        return OnnxRunner(bundle, threads=threads, capacity=rows)
    return open_engine(bundle, runtime, threads=threads)


def _rss_bytes() -> int:
    """The resident set of this process and of those that run programs for it."""
    own = psutil.Process()
    return sum(int(one.memory_info().rss) for one in (own, *own.children(recursive=True)))


def _peak_bytes() -> int:
    """The largest resident set so far; the current one of a child whose peak is unknown."""
    return peak_rss_bytes() + sum(
        process_peak_bytes(child.pid) or int(child.memory_info().rss)
        for child in psutil.Process().children(recursive=True)
    )
