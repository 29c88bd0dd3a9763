"""What a checkpoint says, in torch: the side that an artifact is held to.

Its prompts are laid out by `forward.embed_prompts`, the artifact's by `runtime.splice`: what
differs between the two is found as well as what differs inside a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.export.parity.artifact_side import Features
from pocketvlm.export.parity.metrics import Floats
from pocketvlm.export.parity.questions import Prompt
from pocketvlm.reference_graph.forward import (
    DecoderInputs,
    decode_logits,
    embed_prompts,
    embed_text,
    split_rows,
)
from pocketvlm.reference_graph.tile_budget import TokensByCount, choose_tokens, encode_with_all
from pocketvlm.runtime.generate import Rows

__all__ = ["CheckpointSide"]

_TOGETHER = 4
"""Pictures that the checkpoint encodes at the same time."""


class CheckpointSide:
    """The checkpoint in torch.

    Every forward pass unpacks every weight once, so prompts run together, padded on the right,
    and no dense copy of the model is kept: a certificate needs little more memory than the
    checkpoint itself.
    """

    def __init__(self, checkpoint: Checkpoint, pictures: Sequence[Floats]) -> None:
        self._checkpoint = checkpoint
        self._pixels = torch.from_numpy(np.concatenate(pictures))
        self._seen: TokensByCount = {}
        with torch.inference_mode():
            for together in self._pixels.split(_TOGETHER):
                for count, tiles in encode_with_all(checkpoint, together).items():
                    self._seen.setdefault(count, []).extend(tiles)
        self.features = [
            Features(embeds=tile.embeds.cpu().numpy(), indices=tile.indices.cpu().numpy())
            for tile in self._seen[checkpoint.visual_tokens]
        ]

    def embed(self, token_ids: Sequence[int]) -> Floats:
        """Embeddings of tokens, [1, L, width]."""
        with torch.inference_mode():
            ids = torch.tensor([list(token_ids)])
            embeds: Floats = embed_text(self._checkpoint, ids).numpy()
        return embeds

    def rows(self, prompt: Prompt) -> Rows:
        """The rows of a prompt."""
        remaining = iter(prompt.pictures)
        visual = [
            tile
            for grid in prompt.grids
            for tile in choose_tokens(
                self._checkpoint,
                self._seen,
                list(islice(remaining, grid.tiles)),
                self._pixels,
                grid,
            )
        ]
        with torch.inference_mode():
            token_ids = torch.tensor([prompt.token_ids])
            inputs = embed_prompts(self._checkpoint, token_ids, visual, prompt.grids)
        return Rows(
            embeds=inputs.wide.numpy(),
            positions=inputs.positions_of(0).numpy(),
            is_visual=inputs.is_visual[0].numpy(),
            next_position=int(inputs.next_position[0]),
            mutual=None if inputs.mutual is None else inputs.mutual[0].numpy(),
        )

    def answers(self, prompts: Sequence[Rows], turns: Sequence[int] | None = None) -> list[Floats]:
        """Logits [vocabulary] after each prompt.

        Args:
            prompts: The prompts.
            turns: Rows of each one's first turn, which has its pictures; `None` for all of them.
        """
        return [logits[0] for logits in self.along(prompts, [()] * len(prompts), turns)]

    def along(
        self,
        prompts: Sequence[Rows],
        continuations: Sequence[Sequence[int]],
        turns: Sequence[int] | None = None,
    ) -> list[Floats]:
        """Logits after each prompt and after every token of its given continuation.

        Args:
            prompts: The prompts.
            continuations: Tokens after each.
            turns: As `answers` takes them.

        Returns:
            One array [1 + tokens, vocabulary] a prompt.
        """
        width = prompts[0].embeds.shape[2]
        lengths = [rows.embeds.shape[1] for rows in prompts]
        ends = [length + len(more) for length, more in zip(lengths, continuations, strict=True)]
        embeds = torch.zeros(len(prompts), max(ends), width)
        axes = len(prompts[0].positions)
        positions = torch.zeros(axes, len(prompts), max(ends), dtype=torch.int64)
        is_visual = torch.zeros(len(prompts), max(ends), dtype=torch.bool)
        mutual = torch.full((len(prompts), max(ends)), -1)
        columns = torch.zeros(len(prompts), 1 + max(map(len, continuations)), dtype=torch.int64)
        for row, (rows, more) in enumerate(zip(prompts, continuations, strict=True)):
            start, end = lengths[row], ends[row]
            embeds[row, :start] = torch.from_numpy(rows.embeds[0])
            positions[:, row, :start] = torch.from_numpy(rows.positions)
            is_visual[row, :start] = torch.from_numpy(rows.is_visual)
            if rows.mutual is not None:
                mutual[row, :start] = torch.from_numpy(rows.mutual)
            if more:
                embeds[row, start:end] = torch.from_numpy(self.embed(more)[0])
            positions[:, row, start:] = rows.next_position + torch.arange(max(ends) - start)
            columns[row] = (start - 1 + torch.arange(columns.shape[1])).clamp(max=end - 1)
        embedded, added = split_rows(self._checkpoint.spec, embeds)
        inputs = DecoderInputs(
            embeds=embedded,
            added=added,
            positions=positions,
            is_visual=is_visual,
            next_position=positions[0, :, -1] + 1,
            mutual=mutual if self._checkpoint.spec.decoder.mutual_rows else None,
            reader=torch.tensor(turns or lengths) - 1,
        )
        with torch.inference_mode():
            logits = decode_logits(self._checkpoint, inputs, columns=columns).numpy()
        return [logits[row, : 1 + len(more)] for row, more in enumerate(continuations)]
