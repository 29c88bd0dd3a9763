"""Answers many questions with a checkpoint in torch, in batches of equal prompt length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.evaluation.prompts import PromptLimits, encode_questions
from pocketvlm.reference_graph.activation_rounding import Arithmetic, simulate_arithmetic
from pocketvlm.reference_graph.forward import (
    VisualTokens,
    embed_prompts,
    encode_images,
    greedy_generate,
)
from pocketvlm.weights.modules import cache_dense_weights

if TYPE_CHECKING:
    from pocketvlm.calibration.data.sample import PictureSource, Sample

__all__ = ["answer_with_checkpoint", "checkpoint_limits"]

_CHUNK = 8
"""Batches per chunk; all pictures of a chunk are encoded before its first answer."""


def answer_with_checkpoint(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    max_new_tokens: int,
    ctx: RunContext,
    task: str,
    arithmetic: Arithmetic = "float32",
) -> list[str]:
    """Greedy answers in the order of the questions.

    A picture that several questions of a chunk ask about is encoded once. Prompts are never
    padded: those of one length, with pictures in the same positions, form a batch.

    Args:
        checkpoint: The model.
        samples: Questions.
        batch_size: Prompts, and pictures, per batch.
        max_new_tokens: Longest answer.
        ctx: Progress.
        task: Name of the task for progress.
        arithmetic: The runtime whose kernels quantized layers imitate.

    Raises:
        CalibrationError: A picture cannot be read, or a row cannot be asked; all rows are checked
            before the first is answered.
    """
    processor, eos = checkpoint.processor, checkpoint.processor.eos_token_ids
    limits = checkpoint_limits(checkpoint)
    token_ids = encode_questions(
        processor.encode, processor.tiling, samples, limits, max_new_tokens=max_new_tokens
    )
    answers = [""] * len(samples)
    done = 0
    with (
        torch.inference_mode(),
        cache_dense_weights(checkpoint.model),
        simulate_arithmetic(checkpoint, arithmetic),
    ):
        for start in range(0, len(samples), _CHUNK * batch_size):
            chunk = range(start, min(start + _CHUNK * batch_size, len(samples)))
            features = _encode(checkpoint, [samples[index] for index in chunk], batch_size)
            prompts = {index: token_ids[index] for index in chunk}
            for batch in _equal_batches(prompts, limits, batch_size):
                visual = _stack(features, [samples[index] for index in batch])
                together = torch.tensor([prompts[index] for index in batch])
                generated = greedy_generate(
                    checkpoint,
                    embed_prompts(checkpoint, together, visual),
                    max_new_tokens=max_new_tokens,
                    eos_token_ids=eos,
                )
                for index, tokens in zip(batch, generated, strict=True):
                    answers[index] = processor.decode(tokens)
                done += len(batch)
                ctx.report(task, done, len(samples))
    return answers


def checkpoint_limits(checkpoint: Checkpoint) -> PromptLimits:
    """The limits of prompts of a checkpoint, the same as those of its bundle."""
    spec, reducer = checkpoint.spec, checkpoint.reducer
    return PromptLimits(
        image_token_id=spec.image_token_id,
        placeholders=spec.visual_tokens,
        kept=spec.visual_tokens if reducer is None else reducer.keep,
        keeps_positions=reducer is None or reducer.positions == "original",
        vocabulary=spec.decoder.vocab_size,
        positions=spec.decoder.context_length,
    )


def _image_key(image: PictureSource) -> Path | int:
    """The identity of a picture: its path, or its object."""
    return image if isinstance(image, Path) else id(image)


def _encode(
    checkpoint: Checkpoint, samples: Sequence[Sample], batch_size: int
) -> dict[Path | int, tuple[Tensor, Tensor]]:
    unique = {
        _image_key(image): (sample, number)
        for sample in samples
        for number, image in enumerate(sample.images)
    }
    keys = list(unique)
    features: dict[Path | int, tuple[Tensor, Tensor]] = {}
    for start in range(0, len(keys), batch_size):
        batch = keys[start : start + batch_size]
        images = [sample.open_image(number) for sample, number in (unique[key] for key in batch)]
        visual = encode_images(checkpoint, checkpoint.processor.pixels(images))
        tiles = checkpoint.processor.tiles(images)
        parts = zip(visual.embeds.split(tiles), visual.indices.split(tiles), strict=True)
        features |= dict(zip(batch, parts, strict=True))
    return features


def _stack(
    features: dict[Path | int, tuple[Tensor, Tensor]], samples: Sequence[Sample]
) -> VisualTokens | None:
    """Visual tokens of all pictures, sample by sample."""
    rows = [features[_image_key(image)] for sample in samples for image in sample.images]
    if not rows:
        return None
    return VisualTokens(
        embeds=torch.cat([embeds for embeds, _ in rows]),
        indices=torch.cat([indices for _, indices in rows]),
    )


def _equal_batches(
    prompts: dict[int, list[int]], limits: PromptLimits, batch_size: int
) -> Iterator[list[int]]:
    """Batches of prompt numbers with equal length and placeholders in the same columns."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, ids in prompts.items():
        columns = [at for at, token in enumerate(ids) if token == limits.image_token_id]
        groups.setdefault((len(ids), *columns[:: limits.placeholders]), []).append(number)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]
