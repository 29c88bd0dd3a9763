"""Batches of prompts with answers, and the model's states where it predicts these answers.

Prompts of different lengths share a batch, padded on the right: attention is causal, so no state
that is read here sees what was padded, and no mask is needed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pocketvlm.calibration.data.prompts import Prompt, batch_grids
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import derive_seed
from pocketvlm.errors import CalibrationError
from pocketvlm.models.images.tilings.tile_grid import TileGrid
from pocketvlm.reference_graph.forward import VisualTokens, decoder_states, embed_prompts

__all__ = ["AnswerBatch", "answer_states", "make_batch", "ordered_batches", "shuffled_batches"]


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerBatch:
    """Prompts that run together; their answers' tokens, sample after sample.

    Attributes:
        samples: Their numbers in the calibration set.
        token_ids: int64 [batch, length], padded on the right.
        grids: How the image of each is cut, the same of all.
        answer_starts: Where in each row the prompt ends.
        rows: int64 [tokens]: which prompt an answer's token belongs to.
        columns: int64 [tokens]: where the token before it stands, whose state predicts it.
        labels: int64 [tokens]: the tokens.
        shares: float32 [tokens]: of a sample's loss, so that long answers count as short ones do.
    """

    samples: tuple[int, ...]
    token_ids: Tensor
    grids: list[TileGrid]
    answer_starts: tuple[int, ...]
    rows: Tensor
    columns: Tensor
    labels: Tensor
    shares: Tensor


def make_batch(prompts: Sequence[Prompt], samples: Sequence[int]) -> AnswerBatch:
    """Puts prompts whose images stand in the same columns into one batch.

    Raises:
        CalibrationError: A prompt has no answer.
    """
    chosen = [prompts[index] for index in samples]
    for prompt in chosen:
        if prompt.answer_end <= prompt.answer_start:
            raise CalibrationError(
                f"{prompt.where}: has no answer, or all of it was cut off; distillation compares "
                "models at the answers' tokens, so every sample needs one"
            )
    length = max(len(prompt.token_ids) for prompt in chosen)
    padded = [ids + ids[-1:] * (length - len(ids)) for ids in (p.token_ids for p in chosen)]
    counts = torch.tensor([prompt.answer_end - prompt.answer_start for prompt in chosen])
    answers = [torch.arange(prompt.answer_start, prompt.answer_end) for prompt in chosen]
    rows = torch.arange(len(chosen)).repeat_interleave(counts)
    token_ids = torch.tensor(padded)
    columns = torch.cat(answers)
    return AnswerBatch(
        samples=tuple(samples),
        token_ids=token_ids,
        grids=batch_grids(prompts, samples),
        answer_starts=tuple(prompt.answer_start for prompt in chosen),
        rows=rows,
        columns=columns - 1,
        labels=token_ids[rows, columns],
        shares=(1 / counts.to(torch.float32))[rows],
    )


def ordered_batches(
    prompts: Sequence[Prompt], samples: Sequence[int], size: int
) -> Iterator[tuple[int, ...]]:
    """Batches of samples whose images stand in the same columns, in order."""
    waiting: dict[Hashable, list[int]] = {}
    for index in samples:
        group = waiting.setdefault(prompts[index].sharing(index), [])
        group.append(index)
        if len(group) == size:
            yield tuple(group)
            group.clear()
    yield from (tuple(group) for group in waiting.values() if group)


def shuffled_batches(
    prompts: Sequence[Prompt], samples: Sequence[int], size: int, seed: int
) -> Iterator[tuple[int, ...]]:
    """Endless batches; every sample comes once an epoch, in an order of the seed and the epoch."""
    epoch = 0
    while True:
        order = np.random.default_rng(derive_seed(seed, f"distill epoch {epoch}")).permutation(
            len(samples)
        )
        yield from ordered_batches(prompts, [samples[place] for place in order], size)
        epoch += 1


def answer_states(checkpoint: Checkpoint, batch: AnswerBatch, visual: VisualTokens) -> Tensor:
    """What the head reads where it predicts the answers' tokens, [tokens, width].

    Args:
        checkpoint: The model, whose visual tokens may be fewer than the prompts' placeholders.
        batch: The prompts.
        visual: Visual tokens of its samples, in order.
    """
    inputs = embed_prompts(
        checkpoint, batch.token_ids, visual, batch.grids, answer_starts=batch.answer_starts
    )
    states = decoder_states(checkpoint, inputs)
    # The image stands before the answer, so tokens that were removed from it move all of it.
    removed = batch.token_ids.shape[1] - states.shape[1]
    return states[batch.rows, batch.columns - removed]
