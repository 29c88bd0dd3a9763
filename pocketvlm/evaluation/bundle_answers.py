"""Answers questions with a bundle: its own graphs, preprocessing and prompts, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pocketvlm.bundle import Bundle
from pocketvlm.context import RunContext
from pocketvlm.evaluation.prompts import prompt_messages
from pocketvlm.runtime.engines import open_engine
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.runtime.runner import Runner
from pocketvlm.runtime.splice import PromptLayout, VisualFeatures, embed_rows, lay_out_prompt
from pocketvlm.runtime.text import TextCodec

if TYPE_CHECKING:
    from pocketvlm.calibration.source import Sample

__all__ = ["answer_with_bundle"]


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

    A conversation's earlier turns are given, not generated, which is what sets this apart from
    `runtime.Conversation`. Consecutive questions about one picture encode it once.

    Args:
        bundle: The artifact.
        samples: Questions.
        max_new_tokens: Longest answer.
        ctx: Threads, and whom to tell about progress.
        task: Name of the work.
        runner: The engine; `None` for the first that the bundle has graphs for.

    Raises:
        BundleError: The bundle cannot be run.
        CalibrationError: A picture cannot be read.
    """
    codec = TextCodec.from_bundle(bundle)
    preprocessor = ImagePreprocessor.from_bundle(bundle)
    engine = runner or open_engine(bundle, threads=ctx.threads)
    answers: list[str] = []
    seen: Path | object | None = None
    pictures: list[VisualFeatures] = []
    for sample in samples:
        if sample.image is None:
            pictures = []
        elif not pictures or sample.image is not seen:
            embeds, indices = engine.encode_image(preprocessor.pixels(sample.open_image()))
            pictures = [VisualFeatures(embeds=embeds, indices=indices)]
        seen = sample.image
        layout = lay_out_prompt(
            codec.encode(prompt_messages(sample)),
            pictures,
            image_token_id=codec.image_token_id,
            placeholders=bundle.manifest.visual_tokens_full,
            keeps_positions=bundle.manifest.positions == "original",
        )
        tokens = _greedy(engine, layout, pictures, codec.eos_token_ids, max_new_tokens)
        answers.append(codec.decode(tokens))
        ctx.report(task, len(answers), len(samples))
    return answers


def _greedy(
    runner: Runner,
    layout: PromptLayout,
    pictures: Sequence[VisualFeatures],
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
) -> list[int]:
    runner.reset()
    tokens: list[int] = []
    rows = embed_rows(layout, pictures, runner.embed)
    logits = runner.decode(rows, layout.positions[None], layout.is_visual)
    while (token := int(logits.argmax())) not in eos_token_ids:
        tokens.append(token)
        if len(tokens) == max_new_tokens:
            break
        position = np.array([[layout.next_position + len(tokens) - 1]], np.int64)
        logits = runner.decode(runner.embed([token]), position)
    return tokens
