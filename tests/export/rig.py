"""A plain affine quantizer, a plain reducer and a session that keeps its cache in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.models.reducer import PositionPolicy, ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec
from pocketvlm.reference_graph.forward import (
    DecoderInputs,
    VisualTokens,
    embed_prompts,
    encode_images,
)
from pocketvlm.runtime.onnx.engine import onnxruntime, require_exact_sums
from pocketvlm.weights.affine import AffineWeight

Quantize = Callable[..., AffineWeight]


def quantize_affine(
    weight: Tensor, bits: int, group_size: int | None = 32, *, symmetric: bool = False
) -> AffineWeight:
    """Round-to-nearest, written for tests: nothing here is shared with the stages."""
    rows, columns = weight.shape
    group_size = group_size or columns
    groups = -(-columns // group_size)
    padded = torch.zeros(rows, groups * group_size)
    padded[:, :columns] = weight
    grouped = padded.view(rows, groups, group_size)
    top = 2**bits - 1
    if symmetric:
        scales = grouped.abs().amax(-1) / (2 ** (bits - 1) - 1)
    else:
        scales = (grouped.amax(-1).clamp_min(0) - grouped.amin(-1).clamp_max(0)) / top
    scales = scales.clamp_min(1e-4).half()
    if symmetric:
        zeros = torch.full(scales.shape, 2.0 ** (bits - 1))
    else:
        zeros = (-grouped.amin(-1).clamp_max(0) / scales.float()).round().clamp(0, top)
    codes = (grouped / scales.float()[..., None]).round() + zeros[..., None]
    return AffineWeight.from_codes(
        codes.clamp(0, top).view(rows, -1),
        scales,
        None if symmetric else zeros,
        bits=bits,
        group_size=group_size,
        in_features=columns,
    )


def quantize_checkpoint(
    checkpoint: Checkpoint, bits: int, group_size: int | None = 32, *, symmetric: bool = False
) -> Checkpoint:
    for linear, form in checkpoint.forms().items():
        quantized = quantize_affine(form.dequantize(), bits, group_size, symmetric=symmetric)
        checkpoint.set_form(linear.name, quantized)
    return checkpoint


def make_mask(pattern: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    """Half of the elements by a pattern; `rows` and `columns` are multiples of 8."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, columns, generator=generator)
    if pattern == "2:4":
        return scores.view(rows, -1, 4).argsort(-1).argsort(-1).view(rows, columns) < 2
    if pattern == "blocks":
        cells = scores[::4, ::8] > scores[::4, ::8].median()
        return cells.repeat_interleave(4, 0).repeat_interleave(8, 1)
    return scores > scores.median()


class ReceivedAttention(TokenReducer):
    """Keeps the features that attract the most attention; safe operators only.

    It looks at the first block of the tower as well, so that targets hand over more than one.
    """

    def __init__(self, *, keep: int, positions: PositionPolicy) -> None:
        super().__init__(keep=keep, positions=positions, earlier_blocks=(0,))

    def forward(self, inputs: ReducerInputs) -> tuple[Tensor, Tensor]:
        (first,) = inputs.earlier
        attention = torch.softmax(inputs.queries @ inputs.keys.transpose(-1, -2), dim=-1)
        before = torch.softmax(first.queries @ first.keys.transpose(-1, -2), dim=-1)
        scores = (attention + 2 * before).mean(dim=(1, 2))
        if inputs.has_cls:
            scores = scores[:, 1:]
        factor = inputs.merge_factor
        side = int(scores.shape[1] ** 0.5)
        cells = scores.view(1, side // factor, factor, side // factor, factor)
        merged = cells.mean(dim=(2, 4)).reshape(1, -1)
        best = merged.topk(self.keep, dim=1).indices
        ascending = (-best.float()).topk(self.keep, dim=1).values.neg().to(torch.int64)
        rows = ascending[..., None].expand(-1, -1, inputs.features.shape[-1])
        return torch.gather(inputs.features, 1, rows), ascending


class Decoder:
    """A decoder session whose past and present are the same buffers."""

    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        capacity: int = 64,
        cache_dtype: type[np.generic] = np.float32,
    ) -> None:
        self.session = open_session(folder, "decoder")
        self.binding = self.session.io_binding()
        self.logits = np.zeros((1, 1, spec.decoder.vocab_size), np.float32)
        shape = (1, spec.decoder.kv_heads, capacity, spec.decoder.head_dim)
        self.cache: dict[str, np.ndarray] = {}
        for block in range(spec.decoder.depth):
            for kind in ("key", "value"):
                # Garbage after the past must never be seen.
                buffer = self.cache[f"{block}.{kind}"] = np.full(shape, 100, cache_dtype)
                buffer *= 1 if cache_dtype is np.int8 else 100
                self._bind("input", f"past.{block}.{kind}", buffer)
                self._bind("output", f"present.{block}.{kind}", buffer)
        self._bind("output", "logits", self.logits)
        self.length = 0

    def __call__(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        past = np.array([self.length], np.int64)
        arrays = {"embeds": embeds, "position_ids": positions, "past_length": past}
        for name, array in arrays.items():
            self._bind("input", name, array)
        self.session.run_with_iobinding(self.binding)
        self.length += embeds.shape[1]
        return self.logits[0, 0].copy()

    def _bind(self, side: str, name: str, array: np.ndarray) -> None:
        bind = getattr(self.binding, f"bind_{side}")
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def open_session(folder: Path, role: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    require_exact_sums(options)
    return onnxruntime.InferenceSession(
        folder / "onnx" / f"{role}.onnx", options, providers=["CPUExecutionProvider"]
    )


def make_prompt(
    checkpoint: Checkpoint, seed: int = 0
) -> tuple[Tensor, VisualTokens, DecoderInputs]:
    """Pixels, their visual tokens and a prompt around them."""
    spec = checkpoint.spec
    generator = torch.Generator().manual_seed(seed)
    side = spec.tower.height
    pixels = torch.randn(1, spec.tower.channels, side, side, generator=generator)
    ids = torch.tensor([[5, 6, *[spec.image_token_id] * spec.visual_tokens, 7, 8, 9]])
    with torch.inference_mode():
        visual = encode_images(checkpoint, pixels)
        return pixels, visual, embed_prompts(checkpoint, ids, visual)
