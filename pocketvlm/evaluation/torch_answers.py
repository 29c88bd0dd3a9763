"""Answers many questions with a checkpoint in torch, in batches of equal prompt length."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.evaluation.prompts import PromptLimits, Question, encode_questions
from pocketvlm.machine import available_memory_bytes
from pocketvlm.models.images.tilings.tile_grid import TileGrid
from pocketvlm.reference_graph.activation_rounding import Arithmetic, simulate_activations
from pocketvlm.reference_graph.forward import (
    VisualTokens,
    embed_prompts,
    greedy_generate,
)
from pocketvlm.reference_graph.tile_budget import encode_tiles
from pocketvlm.weights.modules import cache_dense_weights

if TYPE_CHECKING:
    from pocketvlm.calibration.data.sample import Sample

__all__ = ["answer_with_checkpoint", "checkpoint_limits"]

_CHUNK = 8
"""Batches per chunk; all pictures of a chunk are encoded before its first answer."""
_Key = tuple[Path | int, TileGrid]
_Features = dict[_Key, list[VisualTokens]]
"""What tiles of pictures became, [1, k] a tile."""


def answer_with_checkpoint(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    max_new_tokens: int,
    ctx: RunContext,
    task: str,
    arithmetic: Arithmetic = "float32",
    int8_prefill_rows: int | None = None,
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
        int8_prefill_rows: Rows from which a prompt runs on int8 rows (`onnx`); `None` for none.

    Raises:
        CalibrationError: A picture cannot be read, or a row cannot be asked; all rows are checked
            before the first is answered.
    """
    processor, eos = checkpoint.processor, checkpoint.processor.eos_token_ids
    limits = checkpoint_limits(checkpoint)
    questions = encode_questions(
        processor.encode, processor, samples, limits, max_new_tokens=max_new_tokens
    )
    answers = [""] * len(samples)
    done = 0
    with (
        torch.inference_mode(),
        cache_dense_weights(checkpoint.model, budget=available_memory_bytes() // 2),
        simulate_activations(checkpoint, arithmetic, int8_prefill_rows=int8_prefill_rows),
    ):
        for start in range(0, len(samples), _CHUNK * batch_size):
            chunk = range(start, min(start + _CHUNK * batch_size, len(samples)))
            shown = {index: _pictures(samples[index], questions[index]) for index in chunk}
            every = [picture for own in shown.values() for picture in own]
            features = _encode(checkpoint, every, batch_size)
            asked = {index: questions[index] for index in chunk}
            kept = {index: _counts(features, shown[index]) for index in chunk}
            for batch in _equal_batches(asked, kept, limits, batch_size):
                visual = _stack(features, [shown[index] for index in batch])
                together = torch.tensor([asked[index].token_ids for index in batch])
                generated = greedy_generate(
                    checkpoint,
                    embed_prompts(checkpoint, together, visual, asked[batch[0]].grids),
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
    spec, reducer, budget = checkpoint.spec, checkpoint.reducer, checkpoint.tile_budget
    return PromptLimits(
        image_token_id=spec.image_token_id,
        placeholders=spec.visual_tokens,
        kept=checkpoint.visual_tokens if budget is None else budget.tile,
        kept_of_whole=None if budget is None else budget.whole,
        keeps_positions=reducer is None or reducer.positions == "original",
        vocabulary=spec.decoder.vocab_size,
        positions=spec.decoder.context_length,
    )


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """A picture as one question shows it.

    Attributes:
        sample: Whose it is.
        number: Which of its pictures.
        grid: How it is cut.
    """

    sample: Sample
    number: int
    grid: TileGrid

    @property
    def key(self) -> _Key:
        """What equal pictures share: path or object, and the tiles."""
        image = self.sample.images[self.number]
        return image if isinstance(image, Path) else id(image), self.grid


def _pictures(sample: Sample, question: Question) -> list[_Picture]:
    return [
        _Picture(sample=sample, number=number, grid=grid)
        for number, grid in enumerate(question.grids)
    ]


def _encode(checkpoint: Checkpoint, pictures: Sequence[_Picture], batch_size: int) -> _Features:
    unique = list({picture.key: picture for picture in pictures}.values())
    features: _Features = {}
    for start in range(0, len(unique), batch_size):
        batch = unique[start : start + batch_size]
        images = [picture.sample.open_image(picture.number) for picture in batch]
        grids = [picture.grid for picture in batch]
        tiles = encode_tiles(checkpoint, checkpoint.processor.pixels(images, grids), grids)
        features |= dict(zip((picture.key for picture in batch), tiles, strict=True))
    return features


def _stack(features: _Features, prompts: Sequence[Sequence[_Picture]]) -> list[VisualTokens] | None:
    """Visual tokens of each tile of a prompt, for prompts with equally many of each."""
    rows = [[tile for picture in own for tile in features[picture.key]] for own in prompts]
    if not rows[0]:
        return None
    return [
        VisualTokens(
            embeds=torch.cat([tile.embeds for tile in tiles]),
            indices=torch.cat([tile.indices for tile in tiles]),
        )
        for tiles in zip(*rows, strict=True)
    ]


def _counts(features: _Features, pictures: Sequence[_Picture]) -> tuple[int, ...]:
    """Visual tokens of every tile of a prompt."""
    tiles = (tile for picture in pictures for tile in features[picture.key])
    return tuple(tile.indices.shape[1] for tile in tiles)


def _equal_batches(
    questions: dict[int, Question],
    kept: dict[int, tuple[int, ...]],
    limits: PromptLimits,
    batch_size: int,
) -> Iterator[list[int]]:
    """Batches of question numbers with equal length, tiles, and columns of placeholders.

    Args:
        questions: The questions, by their numbers.
        kept: Visual tokens of every tile of each question, which are equal in a batch too.
        limits: Which token is the placeholder.
        batch_size: Questions of a batch, at most.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, asked in questions.items():
        ids = asked.token_ids
        columns = tuple(at for at, token in enumerate(ids) if token == limits.image_token_id)
        # Rows of a map are left out picture by picture.
        alone = number if any(grid.is_map for grid in asked.grids) else None
        alike = (len(ids), columns, tuple(asked.grids), kept[number], alone)
        groups.setdefault(alike, []).append(number)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]
