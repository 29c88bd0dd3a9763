"""One block: this process loads one bundle, answers, and times every stage of every answer.

It calls the parts of the runtime in the order in which the runtime does, with three differences:
generation continues after an end token, the picture is given as encoded bytes, and embedding the
prompt is timed separately from prefill, so that one answer gives both times to first token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.block import AnswerTimes, Block
from pocketvlm.device_bench.workload import Workload, fit_prompt
from pocketvlm.errors import InputError
from pocketvlm.image_file import read_image
from pocketvlm.machine import peak_rss_bytes, process_peak_bytes
from pocketvlm.models.images.tilings import TileGrid
from pocketvlm.reports.measurement import Memory, Prompt
from pocketvlm.runtime.answer import StageClock
from pocketvlm.runtime.detokenize import TextStream
from pocketvlm.runtime.engines import choose_engine, open_engine
from pocketvlm.runtime.generate import StopRules, generate, prompt_rows
from pocketvlm.runtime.onnx.runner import OnnxRunner
from pocketvlm.runtime.picture_rows import PictureRows
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.runtime.runner import Runner
from pocketvlm.runtime.splice import VisualFeatures, lay_out_prompt
from pocketvlm.runtime.text import Message, TextCodec, user_message

__all__ = ["measure_block"]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Loaded:
    """A loaded bundle with the workload that it answers."""

    bundle: Bundle
    codec: TextCodec
    preprocessor: ImagePreprocessor
    rows: PictureRows
    runner: Runner
    workload: Workload
    messages: Sequence[Message]


def measure_block(path: Path, workload: Workload, image: bytes | None, threads: int) -> Block:
    """Loads a bundle and measures the workload on it, in this process.

    Args:
        path: A bundle. Its digests are not checked, because that is not part of loading.
        workload: The workload to measure.
        image: The encoded picture, or `None` for text alone.
        threads: Threads of the heavy graphs.

    Raises:
        BundleError: The bundle cannot be loaded.
        InputError: The workload does not fit the model.
    """
    before_bytes = _rss_bytes()
    clock = StageClock()
    bundle = Bundle.open(path, verify=False)
    codec = TextCodec.from_bundle(bundle)
    preprocessor = ImagePreprocessor.from_bundle(bundle)
    clock.lap("load")
    text, text_tokens = _fit(codec, workload)
    grids = []
    if image is not None:
        grids.append(preprocessor.grid(read_image(image, "the workload's picture")))
    messages = [user_message(text, images=len(grids))]
    full, kept = bundle.manifest.visual_tokens_full, bundle.manifest.visual_tokens
    placeholders = sum(grid.placeholders(full) for grid in grids)
    prompt = codec.encode(messages, grids)
    dropped = placeholders - sum(grid.most_rows(full, kept) for grid in grids)
    rows = len(prompt) - dropped + workload.new_tokens
    _require_positions(bundle, workload, prompt_tokens=len(prompt), dropped=dropped)
    clock.skip()
    runner = _open(bundle, threads, rows)
    clock.lap("load")
    loaded = _Loaded(
        bundle=bundle,
        codec=codec,
        preprocessor=preprocessor,
        rows=PictureRows.from_bundle(bundle),
        runner=runner,
        workload=workload,
        messages=messages,
    )
    after_bytes = _rss_bytes()
    cold, token_ids = _answer(loaded, image)
    for _ in range(workload.warm_ups - 1):
        _answer(loaded, image)
    measured = [_answer(loaded, image) for _ in range(workload.answers)]
    return Block(
        load_ms=sum(clock.laps("load")),
        prompt=Prompt(
            text_sha256=hashlib.sha256(text.encode()).hexdigest(),
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
        token_ids=token_ids,
        is_repeatable=all(ids == token_ids for _, ids in measured),
    )


def _answer(loaded: _Loaded, image: bytes | None) -> tuple[AnswerTimes, tuple[int, ...]]:
    """One answer from an empty cache."""
    runner, codec, manifest = loaded.runner, loaded.codec, loaded.bundle.manifest
    stream = TextStream(codec.decode_raw)
    runner.reset()
    pictures: list[VisualFeatures] = []
    grids: list[TileGrid] = []
    clock = StageClock()
    if image is not None:
        picture = read_image(image, "the workload's picture")
        pixels = loaded.preprocessor.pixels(picture)
        clock.lap("preprocess")
        grids.append(loaded.preprocessor.grid(picture))
        pictures += loaded.rows.encode(runner, pixels, grids[0])
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
        max_new_tokens=loaded.workload.new_tokens,
        end_token_ids=() if loaded.workload.ignore_eos else codec.eos_token_ids,
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


def _fit(codec: TextCodec, workload: Workload) -> tuple[str, int]:
    """The text whose prompt has the workload's number of tokens, and the number counted."""

    def count_tokens(text: str) -> int:
        ids = codec.encode([user_message(text, images=int(workload.has_image))])
        return sum(token != codec.image_token_id for token in ids)

    text = fit_prompt(count_tokens, workload.prompt_tokens)
    return text, count_tokens(text)


def _require_positions(
    bundle: Bundle, workload: Workload, *, prompt_tokens: int, dropped: int
) -> None:
    manifest = bundle.manifest
    prompt = prompt_tokens - (0 if manifest.positions == "original" else dropped)
    needed = prompt + workload.new_tokens
    limit = manifest.generation.max_positions
    if needed > limit:
        raise InputError(
            f"workload {workload.name!r} takes {needed} positions ({prompt} of the prompt, "
            f"{workload.new_tokens} new); {bundle.path} has {limit}"
        )


def _open(bundle: Bundle, threads: int, rows: int) -> Runner:
    """The engine that `ask` would use; ONNX Runtime's cache has exactly the rows needed."""
    if choose_engine(bundle) == "onnx":
        return OnnxRunner(bundle, threads=threads, capacity=rows)
    return open_engine(bundle, threads=threads)


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
