"""TorchRunner: a checkpoint with the interface of an inference engine.

What the certificate compares every artifact with, and a way to hold a conversation with a
checkpoint that was never exported.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.reference_graph.forward import (
    DecoderInputs,
    decode_logits,
    embed_text,
    encode_images,
    new_cache,
    split_rows,
)
from pocketvlm.runtime.runner import Runner, States

__all__ = ["TorchRunner"]


class TorchRunner(Runner):
    """Runs a checkpoint through `pocketvlm.reference_graph.forward`, with its KV cache inside."""

    def __init__(self, checkpoint: Checkpoint, *, capacity: int | None = None) -> None:
        """Wraps a checkpoint; nothing is copied.

        Args:
            checkpoint: The model.
            capacity: Rows of KV cache; `None` for as many as the model has positions.
        """
        super().__init__(
            capacity=capacity or checkpoint.spec.decoder.max_positions,
            schedule=checkpoint.visual_schedule,
        )
        self.checkpoint = checkpoint
        self._visions = {seen.vision_variant.name: seen for seen in checkpoint.each_vision()}
        self._cache = new_cache(checkpoint)

    def encode_image(
        self, pixels: npt.NDArray[np.float32], variant: str | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Pixels [1, C, S, S] to embeddings [1, k, width] and indices [1, k]."""
        seen = self.checkpoint if variant is None else self._visions[variant]
        with torch.inference_mode():
            visual = encode_images(seen, torch.from_numpy(pixels))
        return visual.embeds.numpy(), visual.indices.numpy()

    def embed(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Token ids to embeddings [1, L, width]."""
        with torch.inference_mode():
            embeds: npt.NDArray[np.float32] = embed_text(
                self.checkpoint, torch.tensor([list(token_ids)])
            ).numpy()
        return embeds

    def decode(
        self,
        embeds: npt.NDArray[np.float32],
        position_ids: npt.NDArray[np.int64],
        is_visual: npt.NDArray[np.bool_] | None = None,
        mutual: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Runs L rows after those in the cache and returns the last one's logits."""
        rows = embeds.shape[1]
        self._require_room(rows)
        flags = np.zeros(rows, np.bool_) if is_visual is None else is_visual
        held = self.stage_lengths
        if self._schedule is not None:
            self._text_rows(rows, flags)
        # The cache is cut back here, so that `truncate` and `reset` stay what they are elsewhere.
        if self._length == 0:
            self._cache = new_cache(self.checkpoint)
        else:
            self._crop(held)
        positions = torch.from_numpy(position_ids)[:, None]
        embedded, added = split_rows(self.checkpoint.spec, torch.from_numpy(embeds))
        inputs = DecoderInputs(
            embeds=embedded,
            added=added,
            positions=positions,
            is_visual=torch.from_numpy(flags)[None],
            next_position=positions[0, :, -1] + 1,
            mutual=None if mutual is None else torch.from_numpy(mutual)[None],
        )
        with torch.inference_mode():
            logits = decode_logits(self.checkpoint, inputs, self._cache, last_only=True)
        self._advance(rows)
        values: npt.NDArray[np.float32] = logits[0, -1].numpy()
        return values

    def _states(self) -> States:
        return {str(block): state.numpy() for block, state in self._cache.states.items()}

    def _crop(self, held: npt.NDArray[np.int64]) -> None:
        """Cuts the cache back to the rows that count, in each stage after the first to `held`."""
        lengths = [self._length, *held.tolist()]
        for block in range(self.checkpoint.spec.decoder.depth):
            stage = 0 if self._schedule is None else self._schedule.stage_of(block)
            self._cache.crop(block, lengths[stage])
