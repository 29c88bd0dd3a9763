"""Some samples of a calibration set as they enter the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pocketvlm.calibration.data.prompts import Prompt, batch_grids, tile_rows
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.reference_graph.forward import DecoderInputs, VisualTokens, embed_prompts

__all__ = ["embed_samples", "tokens_of"]


def tokens_of(
    prompts: Sequence[Prompt], samples: Sequence[int], visual: VisualTokens
) -> VisualTokens:
    """The visual tokens of some samples, of those of all prompts."""
    tiles = tile_rows(prompts, samples)
    return VisualTokens(embeds=visual.embeds[tiles], indices=visual.indices[tiles])


def embed_samples(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    samples: Sequence[int],
    visual: VisualTokens,
) -> DecoderInputs:
    """Text and visual tokens of the samples of one batch, answers included.

    Args:
        checkpoint: The model.
        prompts: Token ids of every sample.
        samples: Which of them; alike as `batch_prompts` makes them.
        visual: Their own visual tokens, in order.
    """
    return embed_prompts(
        checkpoint,
        torch.tensor([prompts[index].token_ids for index in samples]),
        visual,
        batch_grids(prompts, samples),
        answer_starts=[prompts[index].answer_start for index in samples],
    )
