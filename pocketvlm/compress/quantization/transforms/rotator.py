"""Where a model may be rotated, and which weights have to turn together.

Between two linears without anything but linear operations and norms, any orthogonal matrix and its
inverse may be inserted. Three places allow that:

- R1, the decoder's residual stream: whatever writes to it (embedding table, projector, the
  row after lines, o, down) is rotated, whatever reads it is rotated back. An RMSNorm commutes with
  a rotation once its weight is folded into the layers after it.
- R2, inside each head, between v and o.
- R3, the tower's residual stream. Its LayerNorms subtract the mean, so only rotations that keep
  the mean commute with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.transforms.folding import (
    fold_norm,
    multiply_inputs,
    read_vector,
    rotate_inputs,
    rotate_outputs,
    write_vector,
)
from pocketvlm.compress.quantization.transforms.orthogonal import fix_ones, random_rotation
from pocketvlm.context import derive_seed
from pocketvlm.models.blocks import BlockSpec, DecoderBlock
from pocketvlm.models.projector import LinearStep

__all__ = ["Rotator"]

# Folding the bias of a norm after its weight divides one by the other; beyond this ratio the
# quotient would eat the digits of float32 that the function needs.
_LARGEST_SHIFT = 1000.0


class Rotator:
    """Rotates one checkpoint, and keeps a record of which side of which layer was rotated.

    Args:
        checkpoint: The model, changed in place; every weight is float, the head is not tied where
            the residual stream is to be rotated.
        seed: Seed of all rotations.
        folder: Where the new weights lie; `None` for memory.
    """

    def __init__(self, checkpoint: Checkpoint, seed: int, folder: Path | None) -> None:
        self._checkpoint = checkpoint
        self._folder = folder
        self._seed = seed
        self._sides: dict[str, dict[str, str]] = {}

    def rotate_residual(self) -> None:
        """R1."""
        spec = self._checkpoint.spec
        decoder = spec.decoder
        rotation = random_rotation(decoder.hidden_size, self._generator("residual"))
        # A table's rows are what it puts out.
        rotate_inputs(self._checkpoint, decoder.embedding, rotation, self._folder)
        self._note(decoder.embedding, "outputs", "residual")
        self._outputs(spec.projector.linears[-1], rotation, "residual")
        if spec.line_break is not None:
            path, _, name = spec.line_break.rpartition(".")
            owner = self._checkpoint.model.get_submodule(path)
            row = read_vector(owner, name)
            if row is not None:
                write_vector(owner, name, row @ rotation)
        for block in decoder.blocks:
            self._rotate_block(block, rotation, "residual")
        self._read_stream(decoder.norm, (decoder.head,), rotation, "residual")

    def rotate_heads(self) -> None:
        """R2: one rotation a key-value head, which the query heads that read it share."""
        decoder, tower = self._checkpoint.spec.decoder, self._checkpoint.spec.tower
        repeats = decoder.heads // decoder.kv_heads
        for block in decoder.blocks:
            if not isinstance(block, BlockSpec):
                continue  # a convolution works on channels as they are
            attention = block.attention
            turns = self._head_rotations(attention.module, decoder.kv_heads, decoder.head_dim)
            self._outputs(attention.v, turns, "heads")
            self._inputs(attention.o, turns.repeat_interleave(repeats, dim=0), "heads")
        for block in tower.blocks[: tower.feature_block + 1]:
            attention = block.attention
            turns = self._head_rotations(attention.module, tower.heads, tower.head_dim)
            self._outputs(attention.v, turns, "heads")
            self._inputs(attention.o, turns, "heads")

    def rotate_tower(self) -> str:
        """R3. Returns why it was not done; empty where it was."""
        spec, model = self._checkpoint.spec, self._checkpoint.model
        tower = spec.tower
        reason = self._why_tower_stays()
        if reason:
            return reason
        rotation = fix_ones(random_rotation(tower.hidden_size, self._generator("tower")))
        patches = model.get_submodule(tower.patch_embedding)
        turned_vectors = [(patches, "weight", 0), (patches, "bias", 0)]
        if tower.position_embedding is not None:
            turned_vectors.append((model.get_submodule(tower.position_embedding), "weight", 1))
        for module, name, axis in turned_vectors:
            values = read_vector(module, name)
            if values is not None:
                turned = (values.movedim(axis, -1) @ rotation).movedim(-1, axis)
                write_vector(module, name, turned.contiguous())
        for block in tower.blocks[: tower.feature_block + 1]:
            self._rotate_block(block, rotation, "tower")
        if tower.feature_norm is not None:
            self._absorb_norm(tower.feature_norm, rotation)
        self._inputs(spec.projector.linears[0], rotation, "tower")
        return ""

    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """One row per layer for the record."""
        return tuple(
            {
                "name": linear.name,
                "part": linear.part,
                "role": linear.role,
                "block": linear.block,
                "method": "rotate" if linear.name in self._sides else "none",
                "inputs": self._sides.get(linear.name, {}).get("inputs"),
                "outputs": self._sides.get(linear.name, {}).get("outputs"),
                "bits_per_weight": form.bits_per_weight,
                "stored_bytes": form.stored_bytes,
            }
            for linear, form in self._checkpoint.forms().items()
        )

    def _rotate_block(self, block: DecoderBlock, rotation: Tensor, stream: str) -> None:
        """What reads a residual stream is turned back, what writes to it is turned."""
        for sublayer in (block.mixer, block.ffn):
            self._read_stream(sublayer.norm, sublayer.inputs, rotation, stream)
            self._outputs(sublayer.output, rotation, stream)

    def _why_tower_stays(self) -> str:
        tower = self._checkpoint.spec.tower
        if tower.pre_norm is not None:
            return "a norm with weights stands between its embeddings and its first block"
        if self._checkpoint.reducer is not None:
            return "the token reducer reads its features, and would choose other tokens"
        projector = self._checkpoint.spec.projector
        if projector.patch_norm is not None or not isinstance(projector.steps[0], LinearStep):
            return "a norm with weights stands between its features and the projector"
        last = tower.feature_norm
        if last is not None and float(self._norm_shift(last).abs().max()) > _LARGEST_SHIFT:
            return "its last norm has channels of almost no weight, whose bias cannot be folded"
        return ""

    def _norm_shift(self, name: str) -> Tensor:
        """Bias of the last norm in units of its weight, [hidden]; zeros where it has none."""
        norm = self._checkpoint.model.get_submodule(name)
        weight, bias = read_vector(norm, "weight"), read_vector(norm, "bias")
        if weight is None:
            raise TypeError("the tower's last norm has no weight")
        if bias is None:
            return torch.zeros_like(weight)
        return torch.where(bias == 0, 0.0, bias / weight)

    def _absorb_norm(self, name: str, rotation: Tensor) -> None:
        """Moves the last norm's weight into the projector; its bias stays, turned.

        The projector may have no bias that could take it up.
        """
        spec, model = self._checkpoint.spec, self._checkpoint.model
        norm = model.get_submodule(name)
        shift, weight = self._norm_shift(name), read_vector(norm, "weight")
        if weight is None:
            raise TypeError("the tower's last norm has no weight")
        width = spec.tower.hidden_size
        copies = spec.projector.merged_width(width) // width
        first = spec.projector.linears[0]
        multiply_inputs(self._checkpoint, first, weight.repeat(copies), self._folder)
        write_vector(norm, "weight", torch.ones_like(weight))
        if spec.tower.has_norm_bias:
            write_vector(norm, "bias", shift @ rotation)

    def _read_stream(
        self, norm: str, linears: tuple[str, ...], rotation: Tensor, stream: str
    ) -> None:
        fold_norm(self._checkpoint, norm, linears, self._folder)
        for name in linears:
            self._inputs(name, rotation, stream)

    def _inputs(self, name: str, rotation: Tensor, which: str) -> None:
        rotate_inputs(self._checkpoint, name, rotation, self._folder)
        self._note(name, "inputs", which)

    def _outputs(self, name: str, rotation: Tensor, which: str) -> None:
        rotate_outputs(self._checkpoint, name, rotation, self._folder)
        self._note(name, "outputs", which)

    def _note(self, name: str, side: str, which: str) -> None:
        self._sides.setdefault(name, {})[side] = which

    def _head_rotations(self, path: str, heads: int, width: int) -> Tensor:
        """One rotation a head, [heads, width, width]."""
        generator = self._generator(path)
        return torch.stack([random_rotation(width, generator) for _ in range(heads)])

    def _generator(self, label: str) -> torch.Generator:
        # Each rotation has its own stream: leaving one out does not change the others.
        return torch.Generator().manual_seed(derive_seed(self._seed, label))
