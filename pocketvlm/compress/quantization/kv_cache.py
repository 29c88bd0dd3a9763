"""Rounds the KV cache to int8: a quarter of its memory, and of what each token has to read.

Scales are fixed: a channel's largest magnitude on the calibration prompts becomes 127. Keys are
measured after the rotary embedding, which is how they are cached. One scale per channel is what
ONNX Runtime's attention takes, and it keeps a few loud channels, which keys are known for (KIVI,
arXiv 2402.02750), from coarsening the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.data.decoder_inputs import embed_samples
from pocketvlm.calibration.data.prompts import (
    BATCH_TOKENS,
    Prompt,
    PromptBatch,
    batch_prompts,
    encode_samples,
)
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError, RecipeError
from pocketvlm.reference_graph.forward import decode_logits, encode_images, new_cache
from pocketvlm.stages import PlanState, Stage, StageResult
from pocketvlm.weights.kv_cache import KVCacheScales

__all__ = ["QuantizeCache"]
_HELD_OUT = 8  # every eighth sample only judges
_FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class QuantizeCache(Stage):
    """Gives the checkpoint an int8 KV cache; stands after every stage that changes weights.

    Attributes:
        bits: Width of a cached number; 8 is what the kernels run.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"quantized_cache"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized_cache"})

    carries_taps: ClassVar[bool] = True

    method: Literal["quantize_cache"] = "quantize_cache"
    bits: int = KVCacheScales.bits

    def __post_init__(self) -> None:
        if self.bits != KVCacheScales.bits:
            raise ValueError(f"bits is {self.bits!r}; a KV cache is rounded to 8 bits")

    def plan(self, state: PlanState) -> PlanState:
        """Narrows the cache."""
        return replace(state, cache_bits=self.bits)

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Measures ranges with the model as it is, and judges the grid on other samples.

        Raises:
            RecipeError: The cache is quantized already.
            CalibrationError: A sample cannot be used, or keys or values are not finite.
        """
        if checkpoint.cache_grid is not None:
            raise RecipeError(f"{self.method}: the KV cache is quantized already")
        prompts = encode_samples(checkpoint.processor, calibration)
        first_held_out = len(prompts) - len(prompts) // _HELD_OUT
        batches = batch_prompts(prompts, first_held_out, BATCH_TOKENS)
        ordered = sorted(batches, key=lambda batch: batch.held_out)
        ranges = _Ranges()
        judge: _Errors | None = None
        for done, batch in enumerate(ordered):
            layers = _cached_states(checkpoint, calibration, prompts, batch)
            if not batch.held_out:
                ranges.add(layers)
            else:
                judge = judge or _Errors(ranges.grid())
                judge.add(layers)
            ctx.report(self.method, done + 1, len(ordered), "keys and values")
        grid = ranges.grid()
        return StageResult(
            checkpoint=replace(checkpoint, cache_grid=grid),
            metrics={
                "bits": self.bits,
                "bytes_per_token": _row_bytes(grid, 1),
                "bytes_per_token_float32": _row_bytes(grid, _FLOAT_BYTES),
                "calibration_samples": first_held_out,
                **({} if judge is None else judge.metrics(len(prompts) - first_held_out)),
            },
        )


class _Ranges:
    """Largest magnitudes of every layer, head and channel."""

    def __init__(self) -> None:
        self._largest: list[tuple[Tensor, Tensor]] = []

    def add(self, layers: Iterator[tuple[Tensor, Tensor]]) -> None:
        for number, states in enumerate(layers):
            keys, values = (state.abs().amax(dim=(0, 2)) for state in states)
            if number == len(self._largest):
                self._largest.append((keys, values))
            before = self._largest[number]
            self._largest[number] = (before[0].maximum(keys), before[1].maximum(values))

    def grid(self) -> KVCacheScales:
        """The grid that spans them.

        Raises:
            CalibrationError: One is not finite.
        """
        keys, values = (torch.stack(column) for column in zip(*self._largest, strict=True))
        if not bool(torch.isfinite(keys).all() and torch.isfinite(values).all()):
            raise CalibrationError("keys or values are not finite on the calibration data")
        return KVCacheScales.from_ranges(keys, values)


class _Errors:
    """What a grid does to states that it was not made from."""

    def __init__(self, grid: KVCacheScales) -> None:
        self._grid = grid
        self._sums = torch.zeros(2, 3, dtype=torch.float64)

    def add(self, layers: Iterator[tuple[Tensor, Tensor]]) -> None:
        for number, states in enumerate(layers):
            rounded = self._grid.round(number, *states)
            scales = (self._grid.keys[number], self._grid.values[number])
            for row, (before, after, scale) in enumerate(zip(states, rounded, scales, strict=True)):
                clipped = before.abs() > 127.5 * scale[:, None, :]
                self._sums[row] += torch.stack(
                    [
                        (after - before).double().square().sum(),
                        before.double().square().sum(),
                        clipped.double().mean() * before.shape[0],
                    ]
                )

    def metrics(self, samples: int) -> dict[str, Any]:
        """Relative errors, and the share of numbers beyond the grid."""
        layers = self._grid.keys.shape[0]
        errors = (self._sums[:, 0] / self._sums[:, 1]).sqrt()
        clipped = self._sums[:, 2] / (layers * samples)
        return {
            "held_out_samples": samples,
            "key_error": float(errors[0]),
            "value_error": float(errors[1]),
            "keys_clipped": float(clipped[0]),
            "values_clipped": float(clipped[1]),
        }


@torch.no_grad()
def _cached_states(
    checkpoint: Checkpoint,
    samples: CalibrationSet,
    prompts: Sequence[Prompt],
    batch: PromptBatch,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values [batch, kv_heads, rows, head_dim] of each layer."""
    visual = encode_images(checkpoint, samples.pixels(checkpoint.processor, batch.samples))
    inputs = embed_samples(checkpoint, prompts, batch.samples, visual)
    cache = new_cache(checkpoint)
    decode_logits(checkpoint, inputs, cache, last_only=True)
    return (cache.rows(block) for block in checkpoint.spec.decoder.attention_blocks)


def _row_bytes(grid: KVCacheScales, bytes_a_number: int) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * grid.keys.numel() * bytes_a_number
