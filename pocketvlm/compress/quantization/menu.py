"""What a layer may become when a solver chooses: the kinds of options, and what each costs."""

from __future__ import annotations

from typing import Literal, assert_never, get_args

from pocketvlm.compress.quantization.affine import GridKind
from pocketvlm.compress.quantization.fitting import Fitter
from pocketvlm.compress.quantization.gptq import AffineFitter
from pocketvlm.compress.quantization.rules import WeightRule
from pocketvlm.modelspec import LinearSpec
from pocketvlm.planned import PlannedAffine, PlannedForm

__all__ = [
    "CONTAINERS",
    "Container",
    "Option",
    "fitter_for",
    "label_of",
    "prior_loss",
    "stored_bytes",
]

Option = WeightRule
"""Every kind of rule that a menu may hold."""

Container = Literal["codes", "onnx"]
CONTAINERS: tuple[Container, ...] = get_args(Container)

# No kernel of ONNX Runtime reads 3 bits.
_ONNX_BITS = {2: 2, 3: 4, 4: 4, 8: 8}
_SCALE_BYTES = 2


def fitter_for(option: Option, *, grid: GridKind, static_groups: bool) -> Fitter[Option]:
    """How layers are quantized that take an option."""
    if isinstance(option, WeightRule):
        return AffineFitter(grid=grid, static_groups=static_groups)
    assert_never(option)


def label_of(option: Option) -> str:
    """Names an option in tables, such as `bits=4 group_size=32 symmetric=False grid=asymmetric`."""
    return " ".join(f"{key}={value}" for key, value in option.describe().items())


def stored_bytes(form: PlannedForm, linear: LinearSpec, container: Container) -> int:
    """Bytes of a layer's codes, scales, zero points and codebooks.

    Args:
        form: What it will be stored as.
        linear: The layer.
        container: `codes` counts the checkpoint's own form, `onnx` what `MatMulNBits` stores,
            whose containers are wider than 3 bits and whose zero points are packed.
    """
    if container == "codes" or not isinstance(form, PlannedAffine):
        return form.stored_bytes(linear.out_features, linear.in_features)
    bits = _ONNX_BITS[form.bits]
    groups = -(-linear.in_features // form.group_size)
    row = -(-groups * form.group_size * bits // 8) + groups * _SCALE_BYTES
    if not form.symmetric or bits != form.bits:
        row += -(-groups * bits // 8)
    return linear.out_features * row


def prior_loss(form: PlannedForm, linear: LinearSpec) -> float:
    """A loss without data: the squared step of a grid falls by four with every bit."""
    elements = linear.out_features * linear.in_features
    if isinstance(form, PlannedAffine):
        return elements * 4.0**-form.bits
    bits = (form.index_bits + (form.residual_bits or 0)) / form.vector_length
    return elements * 4.0**-bits
