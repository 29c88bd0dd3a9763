"""What a layer may become when a solver chooses: the kinds of options, and what each costs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal, get_args

from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.codebook.rules import CodebookRule
from pocketvlm.models.spec import LinearSpec
from pocketvlm.weights.layout import AffineLayout, SparseLayout, WeightLayout, plan_behind_mask

__all__ = [
    "CONTAINERS",
    "Container",
    "Option",
    "check_option",
    "float_bytes",
    "label_of",
    "plan_option",
    "prior_loss",
    "stored_bytes",
]

Option = WeightRule | CodebookRule
"""Every kind of rule that a menu may hold."""

Container = Literal["codes", "onnx"]
CONTAINERS: tuple[Container, ...] = get_args(Container)

# No kernel of ONNX Runtime reads 3 bits.
_ONNX_BITS = {2: 2, 3: 4, 4: 4, 8: 8}
_SCALE_BYTES = 2
_FLOAT_BYTES = 2


def check_option(option: Option) -> None:
    """Checks that an option may be chosen for each layer by itself.

    Raises:
        ValueError: It names layers or keeps them float.
    """
    if (option.part, option.match, option.blocks) != (None, None, None):
        raise ValueError("an option is for every layer; name layers in pins")
    if option.keeps_float:
        raise ValueError("keeps a layer float; pins can do that")


def label_of(option: Option) -> str:
    """Names an option in tables, such as `bits=4 group_size=32 zero_point=integer`.

    Every setting that does something is in it, defaults too, so that a table which outlives a
    default still says what was measured.
    """
    settings = asdict(option)
    if isinstance(option, WeightRule):
        settings["group_size"] = option.group_size or "row"
    elif not option.outliers:
        del settings["outlier_bits"], settings["outlier_length"]
    return " ".join(
        f"{key}={value}"
        for key, value in settings.items()
        if key not in ("part", "match", "blocks") and value not in (None, False)
    )


def stored_bytes(form: WeightLayout, linear: LinearSpec, container: Container) -> int:
    """Bytes of a layer's codes, scales, zero points and codebooks.

    Args:
        form: What it will be stored as.
        linear: The layer.
        container: `codes` counts the checkpoint's own form, `onnx` what `MatMulNBits` stores,
            whose containers are wider than 3 bits, whose zero points are packed, and which knows
            no mask: a matrix without a code of zero is floats there, of 32 bits where a scale
            gives them more digits than float16 has.
    """
    if container == "onnx" and isinstance(form, SparseLayout):
        values = form.values
        if isinstance(values, AffineLayout) and not values.float_zeros:
            return stored_bytes(values, linear, container)  # dropped elements take the code of zero
        is_scaled = isinstance(values, AffineLayout) or bool(values and values.row_scales)
        return float_bytes(linear, None) * (2 if is_scaled else 1)
    if container == "codes" or not isinstance(form, AffineLayout):
        return form.stored_bytes(linear.out_features, linear.in_features)
    bits = _ONNX_BITS[form.bits]
    groups = -(-linear.in_features // form.group_size)
    row = -(-groups * form.group_size * bits // 8) + groups * _SCALE_BYTES
    if not form.symmetric or bits != form.bits:
        row += -(-groups * bits // 8)
    return linear.out_features * row


def float_bytes(linear: LinearSpec, density: float | None) -> int:
    """Bytes of a layer that stays float, as published: bf16, or float16 behind a mask.

    Args:
        linear: The layer.
        density: Share of its elements that a mask keeps; `None` without a mask.
    """
    if density is None:
        return linear.out_features * linear.in_features * _FLOAT_BYTES
    return SparseLayout(density=density).stored_bytes(linear.out_features, linear.in_features)


def plan_option(option: Option, linear: LinearSpec, density: float | None) -> WeightLayout:
    """What a layer will be stored as, behind its mask where it has one.

    Args:
        option: What it becomes.
        linear: The layer.
        density: Share of its elements that a mask keeps; `None` without a mask.

    Raises:
        RecipeError: The option does not fit the layer or its mask.
    """
    planned = option.plan(linear)
    if density is None:
        return planned
    return plan_behind_mask(linear.name, SparseLayout(density=density), planned)


def prior_loss(form: WeightLayout, linear: LinearSpec) -> float:
    """A loss without data: the squared step of a grid falls by four with every bit."""
    elements = linear.out_features * linear.in_features
    if isinstance(form, SparseLayout):
        # What is dropped loses its own square.
        within = 0.0 if form.values is None else prior_loss(form.values, linear)
        return elements * (1 - form.density) + form.density * within
    if isinstance(form, AffineLayout):
        return elements * 4.0**-form.bits
    bits = (form.index_bits + (form.residual_bits or 0)) / form.vector_length
    return elements * 4.0**-bits
