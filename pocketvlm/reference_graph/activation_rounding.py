"""Rounds activations to int8 in torch as the runtimes' kernels do.

What is evaluated before the export is then what the artifact will answer.

A fast kernel multiplies int8 by int4 or int8, so it rounds what enters every quantized layer while
it runs. Two rules cover the runtimes; both are exact up to the order in which float32 is summed,
and are held to the kernels themselves by tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.weights.layout import AffineLayout, without_mask
from pocketvlm.weights.modules import FormLinear

__all__ = [
    "ARITHMETICS",
    "Arithmetic",
    "Scheme",
    "round_per_block",
    "round_per_token",
    "simulate_activations",
    "simulate_arithmetic",
]

Scheme = Literal["per_block_symmetric", "per_token_asymmetric"]
"""`per_block_symmetric`: a scale for each block of a token, as ONNX Runtime's `MatMulNBits` at
accuracy level 4; `per_token_asymmetric`: a scale and a zero point for each token, as ExecuTorch's
8da4w."""

Arithmetic = Literal["float32", "onnx", "executorch"]
"""Whose arithmetic quantized layers follow; `float32` rounds nothing."""

ARITHMETICS: tuple[str, ...] = get_args(Arithmetic)

_SCHEMES: dict[str, Scheme] = {
    "onnx": "per_block_symmetric",
    "executorch": "per_token_asymmetric",
}
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
    # Kernels multiply by a scale's inverse, which does not round like a division.
    codes = (padded * torch.where(largest > _LEAST, 127 / largest, 0.0)).round()
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


@contextmanager
def simulate_activations(
    checkpoint: Checkpoint, scheme: Scheme, *, decoder: bool = True, tower: bool = True
) -> Iterator[None]:
    """Rounds what enters the quantized layers, inside the block.

    Layers that are not quantized compute in float32 on every runtime, and so they do here.

    Args:
        checkpoint: The model, quantized as it is.
        scheme: How a token is rounded.
        decoder: Whether the decoder's and the head's inputs are rounded.
        tower: Whether the tower's and the projector's are.

    Raises:
        ValueError: The scheme is unknown.
    """
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme is {scheme!r}; allowed are {', '.join(get_args(Scheme))}")
    spec = checkpoint.spec
    parts = {"decoder": decoder, "head": decoder, "tower": tower, "projector": tower}
    names = {linear.name for linear in spec.linears() if parts.get(linear.part)}
    if decoder:
        names.add(spec.decoder.head)  # a tied head is not a separate linear
    with ExitStack() as stack:
        for name in sorted(names):
            layer = cast("FormLinear", checkpoint.layer(name))
            rounding = _rounding(layer, scheme)
            if rounding is not None:
                stack.callback(layer.register_forward_pre_hook(_before(rounding)).remove)
        yield


@contextmanager
def simulate_arithmetic(checkpoint: Checkpoint, arithmetic: Arithmetic) -> Iterator[None]:
    """Follows a runtime's arithmetic at its fastest setting, in all parts, inside the block.

    Raises:
        ValueError: The arithmetic is unknown.
    """
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic is {arithmetic!r}; allowed are {', '.join(ARITHMETICS)}")
    if arithmetic == "float32":
        yield
        return
    with simulate_activations(checkpoint, _SCHEMES[arithmetic]):
        yield


def _rounding(layer: FormLinear, scheme: Scheme) -> Callable[[Tensor], Tensor] | None:
    """How a layer's inputs are rounded; `None` for a layer that its kernel runs in float32."""
    layout = without_mask(layer.form.layout)
    if not isinstance(layout, AffineLayout):
        return None
    if scheme == "per_token_asymmetric":
        return round_per_token
    # ONNX Runtime has no integer kernel for these: it widens the weights and stays in float32.
    if layout.float_zeros or (layout.bits, layout.group_size) == (2, 16):
        return None
    group_size = layout.group_size
    return lambda inputs: round_per_block(inputs, group_size)


def _before(
    rounding: Callable[[Tensor], Tensor],
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (rounding(inputs[0]),)

    return hook
