"""Answers questions with a bundle, one at a time, with its graphs, preprocessing and prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pocketvlm.bundle import Bundle
from pocketvlm.context import RunContext
from pocketvlm.errors import BundleError
from pocketvlm.evaluation.prompts import PromptLimits, encode_questions, require_fitting
from pocketvlm.models.images.tilings.tile_grid import TileGrid
from pocketvlm.prompt.generation_settings import GenerationSettings
from pocketvlm.runtime.engines import ENGINES, Engine, open_engine
from pocketvlm.runtime.generate import Rows, StopRules, generate, prompt_rows
from pocketvlm.runtime.picture_rows import PictureRows
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.runtime.runner import Runner
from pocketvlm.runtime.splice import VisualFeatures, lay_out_prompt
from pocketvlm.runtime.text import TextCodec

if TYPE_CHECKING:
    from pocketvlm.calibration.data.sample import Sample

__all__ = ["answer_with_bundle", "bundle_limits", "open_for_questions"]


def answer_with_bundle(
    bundle: Bundle,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    ctx: RunContext,
    task: str,
    runner: Runner | None = None,
) -> list[str]:
    """Greedy answers in the order of the questions.

    Earlier turns of a conversation are given, not generated, unlike in `runtime.Conversation`.
    Consecutive questions about one picture encode it once. All rows are checked before the first is
    answered.

    Args:
        bundle: The bundle.
        samples: Questions.
        max_new_tokens: Longest answer.
        ctx: Threads and progress.
        task: Name of the task for progress.
        runner: The engine; `None` for the first that the bundle has graphs for.

    Raises:
        BundleError: The bundle cannot be run.
        CalibrationError: A picture cannot be read, or a row cannot be asked.
    """
    codec = TextCodec.from_bundle(bundle)
    preprocessor = ImagePreprocessor.from_bundle(bundle)
    limits = bundle_limits(bundle, codec)
    encode, rows = codec.encode, PictureRows.from_bundle(bundle)
    questions = encode_questions(
        encode, preprocessor, samples, limits, max_new_tokens=max_new_tokens
    )
    engine = runner or open_for_questions(
        bundle, samples, max_new_tokens=max_new_tokens, threads=ctx.threads
    )
    # Programs of other targets have a cache of fixed size.
    limits = replace(limits, rows=engine.capacity)
    require_fitting(questions, samples, limits, max_new_tokens=max_new_tokens)
    answers: list[str] = []
    seen: dict[tuple[Path | int, TileGrid], list[VisualFeatures]] = {}
    for sample, question in zip(samples, questions, strict=True):
        keys = [
            (image if isinstance(image, Path) else id(image), grid)
            for image, grid in zip(sample.images, question.grids, strict=True)
        ]
        seen = {key: seen[key] for key in keys if key in seen}
        for number, key in enumerate(keys):
            if key not in seen:
                pixels = preprocessor.pixels(sample.open_image(number), key[1])
                seen[key] = rows.encode(engine, pixels, key[1])
        tiles = [tile for key in keys for tile in seen[key]]
        pictures = [replace(tile, serial=serial) for serial, tile in enumerate(tiles)]
        layout = lay_out_prompt(
            question.token_ids,
            pictures,
            image_token_id=codec.image_token_id,
            keeps_positions=bundle.manifest.positions == "original",
            axes=bundle.manifest.position_axes,
        )
        kind = bundle.manifest.kv_cache.mutual_rows
        prompt = prompt_rows(layout, pictures, engine, mutual_rows=kind)
        tokens = _greedy(engine, prompt, question.token_ids, codec.generation, max_new_tokens)
        answers.append(codec.decode(tokens))
        ctx.report(task, len(answers), len(samples))
    return answers


def open_for_questions(
    bundle: Bundle,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    runtime: str | None = None,
    threads: int | None = None,
    engines: Mapping[str, Engine] = ENGINES,
) -> Runner:
    """Loads an engine with room for the longest question.

    Args:
        bundle: The bundle.
        samples: Questions.
        max_new_tokens: Longest answer.
        runtime: Name of the engine; `None` for the first that the bundle has graphs for.
        threads: Threads of the engine.
        engines: How each is opened.

    Raises:
        BundleError: The bundle cannot be run.
        CalibrationError: A row cannot be asked.
        InputError: There is no such engine.
    """
    codec = TextCodec.from_bundle(bundle)
    limits = bundle_limits(bundle, codec)
    preprocessor = ImagePreprocessor.from_bundle(bundle)
    questions = encode_questions(
        codec.encode, preprocessor, samples, limits, max_new_tokens=max_new_tokens
    )
    rows = max(map(limits.rows_of, questions), default=0) + max_new_tokens
    return open_engine(bundle, runtime, threads=threads, rows=rows, engines=engines)


def bundle_limits(bundle: Bundle, codec: TextCodec) -> PromptLimits:
    """The limits of prompts of a bundle, whatever engine runs it.

    Raises:
        BundleError: The manifest lacks one of them.
    """
    manifest = bundle.manifest
    kept, of_whole = manifest.tile_tokens
    vocabulary = next(
        (
            output.shape[-1]
            for component in manifest.components
            if component.role == "decoder"
            for output in component.outputs
            if output.name == "logits"
        ),
        None,
    )
    if not isinstance(vocabulary, int):
        raise BundleError(f"{bundle.path}: manifest.json has no decoder with logits of a size")
    return PromptLimits(
        image_token_id=codec.image_token_id,
        placeholders=manifest.visual_tokens_full,
        kept=kept,
        kept_of_whole=of_whole,
        keeps_positions=manifest.positions == "original",
        vocabulary=vocabulary,
        positions=manifest.generation.max_positions,
    )


def _greedy(
    runner: Runner,
    rows: Rows,
    prompt: Sequence[int],
    settings: GenerationSettings,
    max_new_tokens: int,
) -> list[int]:
    runner.reset()
    ends = settings.eos_token_ids
    tokens = list(
        generate(
            runner,
            rows,
            StopRules(max_new_tokens=max_new_tokens, end_token_ids=ends),
            adjust=lambda logits, chosen: settings.adjust(logits, prompt, chosen),
        )
    )
    return tokens[:-1] if tokens[-1] in ends else tokens
