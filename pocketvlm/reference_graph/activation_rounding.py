"""Rounds activations to int8 in torch as the runtimes' kernels do.

What is evaluated before the export is then what the artifact will answer.

A fast kernel multiplies int8 by int4 or int8, so it rounds what enters every quantized layer while
it runs. Three rules cover the runtimes; all are exact up to the order in which float32 is summed,
and are held to the kernels themselves by tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.models.layers import Part
from pocketvlm.weights.layout import AffineLayout, WeightLayout, has_groups, without_mask
from pocketvlm.weights.modules import FormLinear

__all__ = [
    "ARITHMETICS",
    "Arithmetic",
    "input_rounding",
    "round_per_block",
    "round_per_tile",
    "round_per_token",
    "simulate_activations",
]

Arithmetic = Literal["float32", "onnx", "executorch"]
"""Whose arithmetic quantized layers follow; `float32` rounds nothing."""

ARITHMETICS: tuple[str, ...] = get_args(Arithmetic)

Rounding = Callable[[Tensor], Tensor]
"""From the inputs of a layer, float32 [batch, tokens, width], to what their integers stand for."""

_LEAST = 1e-36  # a smaller scale has no inverse in float32
_EPSILON = torch.finfo(torch.float32).eps


def round_per_block(inputs: Tensor, block: int) -> Tensor:
    """Rounds blocks of channels to 255 levels around zero.

    Args:
        inputs: float32 [..., width].
        block: Channels that share a scale, which is their largest magnitude over 127; the last
            block may be narrower.

    Returns:
        What the integers stand for, float32 of the same shape.
    """
    width = inputs.shape[-1]
    padded = functional.pad(inputs, (0, -width % block)).unflatten(-1, (-1, block))
    largest = padded.abs().amax(dim=-1, keepdim=True)
    # Kernels multiply by a scale's inverse, which does not round like a division. The inverse is a
    # division of tensors: of a number and a tensor, torch makes a reciprocal and a product, and
    # where codes of few levels lie between two others, the last bit decides.
    inverse = largest.new_tensor(127) / largest
    codes = (padded * torch.where(largest > _LEAST, inverse, 0.0)).round()
    return (codes * (largest / 127)).flatten(-2)[..., :width]


def round_per_token(inputs: Tensor) -> Tensor:
    """Rounds each token to 256 levels between its least and its largest channel, zero included.

    Args:
        inputs: float32 [..., width].

    Returns:
        What the integers stand for, float32 of the same shape.
    """
    low = inputs.amin(dim=-1, keepdim=True).clamp(max=0)
    high = inputs.amax(dim=-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=_EPSILON)
    # The zero point is taken from the end of the range at which it errs less.
    below, above = low / scale, high / scale
    zero = torch.where(below + above > 1, -128 - below, 127 - above).clamp(-128, 127).round()
    codes = ((inputs * (1 / scale)).round() + zero).clamp(-128, 127)
    return (codes - zero) * scale


def round_per_tile(inputs: Tensor) -> Tensor:
    """Rounds a tile to 256 levels between its least and its largest number, zero included.

    Args:
        inputs: float32 [tiles, tokens, width].

    Returns:
        What the integers stand for, float32 of the same shape.
    """
    low, high = torch.aminmax(inputs.flatten(1), dim=1)
    low, high = low.clamp(max=0)[:, None, None], high.clamp(min=0)[:, None, None]
    scale = torch.where(high > low, (high - low) / 255, 1.0)
    zero = (-low / scale).clamp(0, 255).round()
    codes = ((inputs / scale).round() + zero).clamp(0, 255)
    return (codes - zero) * scale


def input_rounding(
    layout: WeightLayout | None, columns: int, part: Part, arithmetic: Arithmetic
) -> Rounding | None:
    """How the inputs of a layer are rounded; `None` for one that its kernel runs in float32.

    Args:
        layout: How its weight is stored.
        columns: Of the weight.
        part: Where in the model it stands.
        arithmetic: Whose kernel it is.
    """
    plain = without_mask(layout)
    if arithmetic == "float32" or not isinstance(plain, AffineLayout):
        return None
    if arithmetic == "executorch":
        return round_per_token
    if plain.has_byte_rows(columns):
        if part in ("tower", "projector"):
            return round_per_tile
        return partial(round_per_block, block=columns)
    # ONNX Runtime has no integer kernel for these: it widens the weights and stays in float32.
    if plain.float_zeros or (plain.bits, plain.group_size) == (2, 16):
        return None
    return partial(round_per_block, block=plain.group_size)


@contextmanager
def simulate_activations(
    checkpoint: Checkpoint,
    arithmetic: Arithmetic,
    *,
    decoder: bool = True,
    tower: bool = True,
    int8_prefill_rows: int | None = None,
) -> Iterator[None]:
    """Follows a runtime's arithmetic at its fastest setting, inside the block.

    Layers that are not quantized compute in float32 on every runtime, and so they do here.

    Args:
        checkpoint: The model, quantized as it is.
        arithmetic: Whose.
        decoder: Whether the decoder's and the head's inputs are rounded.
        tower: Whether the tower's and the projector's are.
        int8_prefill_rows: Rows of a call of the decoder from which all but the last are multiplied
            by weights that are rounded once more, to int8 with one scale per row, as
            `export.onnx.prefill` has it; `None` for no such calls.

    Raises:
        ValueError: The arithmetic is unknown, or has no such calls.
    """
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic is {arithmetic!r}; allowed are {', '.join(ARITHMETICS)}")
    if int8_prefill_rows is not None and arithmetic != "onnx":
        raise ValueError(f"int8_prefill_rows is the ONNX target's, and arithmetic {arithmetic!r}")
    spec = checkpoint.spec
    parts = {"decoder": decoder, "head": decoder, "tower": tower, "projector": tower}
    layers = {linear.name: linear.part for linear in spec.linears() if parts.get(linear.part)}
    if decoder:
        layers[spec.decoder.head] = "head"  # a tied head is not a separate linear
    with ExitStack() as stack:
        for name, part in sorted(layers.items()):
            layer = cast("FormLinear", checkpoint.layer(name))
            layout, columns = layer.form.layout, layer.form.shape[1]
            rounding = input_rounding(layout, columns, part, arithmetic)
            if int8_prefill_rows is not None and part == "decoder" and has_groups(layout, columns):
                calls = _LongCalls(rounding, int8_prefill_rows)
                stack.callback(layer.register_forward_pre_hook(calls.before).remove)
                stack.callback(layer.register_forward_hook(calls.after).remove)
            elif rounding is not None:
                stack.callback(layer.register_forward_pre_hook(_before(rounding)).remove)
        yield


class _LongCalls:
    """A layer that multiplies all rows of a long call but the last by int8 rows."""

    def __init__(self, rounding: Rounding | None, least_rows: int) -> None:
        """Takes how other calls are rounded, and how many rows a long one has."""
        self._rounding = rounding
        self._least_rows = least_rows
        self._before_last: Tensor | None = None

    def before(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Leaves to the layer what its own weights multiply."""
        rows, self._before_last = inputs[0], None
        if rows.shape[-2] >= self._least_rows:
            self._before_last, rows = rows[..., :-1, :], rows[..., -1:, :]
        return (rows if self._rounding is None else self._rounding(rows),)

    def after(self, module: nn.Module, _inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        """Puts the other rows before them."""
        if self._before_last is None:
            return outputs
        layer = cast("FormLinear", module)
        columns = layer.form.shape[1]
        rows = round_per_block(self._before_last, columns)
        weight = round_per_block(layer.weight, columns)
        return torch.cat([functional.linear(rows, weight, layer.bias), outputs], dim=-2)


def _before(
    rounding: Rounding,
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (rounding(inputs[0]),)

    return hook
