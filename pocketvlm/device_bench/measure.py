"""One block: this process loads one bundle, answers, and times every stage of every answer.

It uses the runtime's own pieces in the runtime's own order, with three differences that a
measurement needs: generation goes on behind an end token, the picture comes as encoded bytes, and
embedding the prompt is timed apart from prefilling it, so that both times to first token follow
from one answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.workload import Workload, fit_prompt
from pocketvlm.errors import InputError
from pocketvlm.images.file import read_image
from pocketvlm.machine import peak_rss_bytes, process_peak_bytes
from pocketvlm.runtime.detokenize import TextStream
from pocketvlm.runtime.engines import choose_engine, open_engine
from pocketvlm.runtime.onnx.runner import OnnxRunner
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.runtime.runner import Runner
from pocketvlm.runtime.sampling import GREEDY
from pocketvlm.runtime.splice import VisualFeatures, embed_rows, lay_out_prompt
from pocketvlm.runtime.text import Message, TextCodec, user_message

__all__ = ["AnswerTimes", "measure_block"]


@dataclass(frozen=True, kw_only=True)
class AnswerTimes:
    """One answer, in milliseconds.

    Attributes:
        preprocess_ms: Encoded bytes to pixels; `None` without a picture, as for the next one.
        vision_ms: Pixels to visual tokens. Reducing tokens is part of this graph.
        tokenize_ms: Message to token ids, and their layout.
        embed_ms: Token ids to the rows that are prefilled.
        prefill_ms: Those rows to the first logits.
        decode_ms: Embedding and running each further token.
        sample_ms: Choosing each token.
        detokenize_ms: Turning each token into text.
        ttft_user_ms: From encoded picture and text to the text of the first token.
        ttft_engine_ms: From the embedded prompt to the first token's id.
        decode_span_ms: From the first token's text to the last one's.
        prompt_tokens: Rows that were prefilled.
        new_tokens: Tokens that were generated, the first one included.
    """

    preprocess_ms: float | None
    vision_ms: float | None
    tokenize_ms: float
    embed_ms: float
    prefill_ms: float
    decode_ms: tuple[float, ...]
    sample_ms: tuple[float, ...]
    detokenize_ms: tuple[float, ...]
    ttft_user_ms: float
    ttft_engine_ms: float
    decode_span_ms: float
    prompt_tokens: int
    new_tokens: int


@dataclass(kw_only=True)
class _Laps:
    """Times since the lap before, in milliseconds."""

    start: float = field(default_factory=perf_counter)

    def __post_init__(self) -> None:
        self._last = self.start

    def lap(self) -> float:
        now = perf_counter()
        elapsed = (now - self._last) * 1e3
        self._last = now
        return elapsed

    def total(self) -> float:
        return (self._last - self.start) * 1e3


@dataclass(frozen=True, kw_only=True, eq=False)
class _Loaded:
    """A bundle that is ready to answer one workload."""

    bundle: Bundle
    codec: TextCodec
    preprocessor: ImagePreprocessor
    runner: Runner
    workload: Workload
    messages: Sequence[Message]


def measure_block(
    path: Path, workload: Workload, image: bytes | None, threads: int
) -> Mapping[str, Any]:
    """Loads a bundle and measures the workload on it, in this process.

    Args:
        path: A bundle; its digests are the caller's business, they are not part of loading.
        workload: What to measure.
        image: The encoded picture, or `None` for text alone.
        threads: Threads of the heavy graphs.

    Returns:
        JSON values: `load_ms` and what of it unpacking weights took, `expand_ms`; `prompt`,
        `cold`, `answers`, `memory` and `token_ids`.

    Raises:
        BundleError: The bundle cannot be loaded.
        InputError: The workload does not fit the model.
    """
    before_bytes = _rss_bytes()
    laps = _Laps()
    bundle = Bundle.open(path, verify=False)
    codec = TextCodec.from_bundle(bundle)
    preprocessor = ImagePreprocessor.from_bundle(bundle)
    load_ms = laps.lap()
    text, text_tokens = _fit(codec, workload)
    manifest = bundle.manifest
    visual_tokens = manifest.visual_tokens if workload.has_image else 0
    rows = workload.prompt_tokens + visual_tokens + workload.new_tokens
    _require_positions(bundle, workload)
    laps.lap()
    runner = _open(bundle, threads, rows)
    load_ms += laps.lap()
    loaded = _Loaded(
        bundle=bundle,
        codec=codec,
        preprocessor=preprocessor,
        runner=runner,
        workload=workload,
        messages=[user_message(text, images=int(workload.has_image))],
    )
    after_bytes = _rss_bytes()
    cold, token_ids = _answer(loaded, image)
    for _ in range(workload.warm_ups - 1):
        _answer(loaded, image)
    measured = [_answer(loaded, image) for _ in range(workload.answers)]
    return {
        "load_ms": load_ms,
        "expand_ms": runner.expand_ms,
        "prompt": {
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "text_tokens": text_tokens,
            "visual_tokens": visual_tokens,
            "tokens": cold.prompt_tokens,
        },
        "cold": asdict(cold),
        "answers": [asdict(times) for times, _ in measured],
        "memory": {
            "before_load_rss_bytes": before_bytes,
            "after_load_rss_bytes": after_bytes,
            "peak_rss_bytes": _peak_bytes(),
        },
        "token_ids": token_ids,
        "is_repeatable": all(ids == token_ids for _, ids in measured),
    }


def _answer(loaded: _Loaded, image: bytes | None) -> tuple[AnswerTimes, list[int]]:
    """One answer from an empty cache."""
    runner, codec, manifest = loaded.runner, loaded.codec, loaded.bundle.manifest
    generator = GREEDY.generator()
    stream = TextStream(codec.decode_raw)
    runner.reset()
    preprocess_ms = vision_ms = None
    pictures: list[VisualFeatures] = []
    laps = _Laps()
    if image is not None:
        pixels = loaded.preprocessor.pixels(read_image(image, "the workload's picture"))
        preprocess_ms = laps.lap()
        embeds, indices = runner.encode_image(pixels)
        pictures.append(VisualFeatures(embeds=embeds, indices=indices))
        vision_ms = laps.lap()
    layout = lay_out_prompt(
        codec.encode(loaded.messages),
        pictures,
        image_token_id=codec.image_token_id,
        placeholders=manifest.visual_tokens_full,
        keeps_positions=manifest.positions == "original",
    )
    tokenize_ms = laps.lap()
    rows = embed_rows(layout, pictures, runner.embed)
    embed_ms = laps.lap()
    logits = runner.decode(rows, layout.positions[None], layout.is_visual)
    prefill_ms = laps.lap()
    token_ids = [GREEDY.choose(logits, generator)]
    sample_ms = [laps.lap()]
    stream.push(token_ids[0])
    detokenize_ms = [laps.lap()]
    ttft_user_ms = laps.total()
    decode_ms: list[float] = []
    while len(token_ids) < loaded.workload.new_tokens:
        if not loaded.workload.ignore_eos and token_ids[-1] in codec.eos_token_ids:
            break
        position = layout.next_position + len(token_ids) - 1
        step = runner.embed(token_ids[-1:])
        logits = runner.decode(step, np.array([[position]], np.int64))
        decode_ms.append(laps.lap())
        token_ids.append(GREEDY.choose(logits, generator))
        sample_ms.append(laps.lap())
        stream.push(token_ids[-1])
        detokenize_ms.append(laps.lap())
    times = AnswerTimes(
        preprocess_ms=preprocess_ms,
        vision_ms=vision_ms,
        tokenize_ms=tokenize_ms,
        embed_ms=embed_ms,
        prefill_ms=prefill_ms,
        decode_ms=tuple(decode_ms),
        sample_ms=tuple(sample_ms),
        detokenize_ms=tuple(detokenize_ms),
        ttft_user_ms=ttft_user_ms,
        ttft_engine_ms=prefill_ms + sample_ms[0],
        decode_span_ms=laps.total() - ttft_user_ms,
        prompt_tokens=len(layout.codes),
        new_tokens=len(token_ids),
    )
    return times, token_ids


def _fit(codec: TextCodec, workload: Workload) -> tuple[str, int]:
    """The text whose prompt has the workload's number of tokens, and that number as counted."""

    def count_tokens(text: str) -> int:
        ids = codec.encode([user_message(text, images=int(workload.has_image))])
        return sum(token != codec.image_token_id for token in ids)

    text = fit_prompt(count_tokens, workload.prompt_tokens)
    return text, count_tokens(text)


def _require_positions(bundle: Bundle, workload: Workload) -> None:
    manifest = bundle.manifest
    kept = (
        manifest.visual_tokens_full if manifest.positions == "original" else manifest.visual_tokens
    )
    visual = kept if workload.has_image else 0
    needed = workload.prompt_tokens + visual + workload.new_tokens
    limit = manifest.generation.max_positions
    if needed > limit:
        raise InputError(
            f"workload {workload.name!r} takes {needed} positions ({workload.prompt_tokens} text, "
            f"{visual} visual, {workload.new_tokens} new); {bundle.path} has {limit}"
        )


def _open(bundle: Bundle, threads: int, rows: int) -> Runner:
    """The engine that the bundle would be asked with; ONNX Runtime's cache is made to measure."""
    if choose_engine(bundle) == "onnx":
        return OnnxRunner(bundle, threads=threads, capacity=rows)
    return open_engine(bundle, threads=threads)


def _rss_bytes() -> int:
    """The resident set of this process, and of one that runs the program for it."""
    own = psutil.Process()
    return sum(int(one.memory_info().rss) for one in (own, *own.children(recursive=True)))


def _peak_bytes() -> int:
    """The largest that it was; of another process the present one where nothing tells more."""
    return peak_rss_bytes() + sum(
        process_peak_bytes(child.pid) or int(child.memory_info().rss)
        for child in psutil.Process().children(recursive=True)
    )
