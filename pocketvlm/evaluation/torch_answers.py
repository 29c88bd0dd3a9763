"""Answers many questions with a checkpoint in torch: prompts of one length go together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.evaluation.prompts import prompt_messages
from pocketvlm.forward import VisualTokens, embed_prompts, encode_images, greedy_generate
from pocketvlm.simulation import Arithmetic, simulate_arithmetic
from pocketvlm.weights import cache_dense_weights

if TYPE_CHECKING:
    from pocketvlm.calibration.source import Sample

__all__ = ["answer_with_checkpoint"]

_CHUNK = 8
"""Batches whose pictures are encoded before the first of them is answered."""


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
    padded: those of one length, with the picture in one place, form a batch.

    Args:
        checkpoint: The model.
        samples: Questions.
        batch_size: Prompts, and pictures, that run together.
        max_new_tokens: Longest answer.
        ctx: Whom to tell about progress.
        task: Name of the work.
        arithmetic: Whose kernels the quantized layers follow.

    Raises:
        CalibrationError: A picture cannot be read.
    """
    processor, eos = checkpoint.processor, checkpoint.processor.eos_token_ids
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
            prompts = {index: processor.encode(prompt_messages(samples[index])) for index in chunk}
            for batch in _equal_batches(prompts, checkpoint.spec.image_token_id, batch_size):
                visual = _stack(features, [samples[index] for index in batch])
                token_ids = torch.tensor([prompts[index] for index in batch])
                generated = greedy_generate(
                    checkpoint,
                    embed_prompts(checkpoint, token_ids, visual),
                    max_new_tokens=max_new_tokens,
                    eos_token_ids=eos,
                )
                for index, tokens in zip(batch, generated, strict=True):
                    answers[index] = processor.decode(tokens)
                done += len(batch)
                ctx.report(task, done, len(samples))
    return answers


def _image_key(sample: Sample) -> Path | int:
    """Equal for questions about one picture: its path, or the very object."""
    return sample.image if isinstance(sample.image, Path) else id(sample.image)


def _encode(
    checkpoint: Checkpoint, samples: Sequence[Sample], batch_size: int
) -> dict[Path | int, tuple[Tensor, Tensor]]:
    unique = {_image_key(sample): sample for sample in samples if sample.image is not None}
    keys = list(unique)
    features: dict[Path | int, tuple[Tensor, Tensor]] = {}
    for start in range(0, len(keys), batch_size):
        batch = keys[start : start + batch_size]
        images = [unique[key].open_image() for key in batch]
        visual = encode_images(checkpoint, checkpoint.processor.pixels(images))
        features |= {
            key: (visual.embeds[row], visual.indices[row]) for row, key in enumerate(batch)
        }
    return features


def _stack(
    features: dict[Path | int, tuple[Tensor, Tensor]], samples: Sequence[Sample]
) -> VisualTokens | None:
    if samples[0].image is None:
        return None
    rows = [features[_image_key(sample)] for sample in samples]
    return VisualTokens(
        embeds=torch.stack([embeds for embeds, _ in rows]),
        indices=torch.stack([indices for _, indices in rows]),
    )


def _equal_batches(
    prompts: dict[int, list[int]], image_token_id: int, batch_size: int
) -> Iterator[list[int]]:
    """Numbers of prompts that have one length and their placeholders in the same columns."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, ids in prompts.items():
        column = ids.index(image_token_id) if image_token_id in ids else -1
        groups.setdefault((len(ids), column), []).append(number)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]
