"""What a layer may become when a solver chooses: the kinds of options, and what each costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Literal, get_args

from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.compress.quantization.codebook.rules import CodebookRule
from pocketvlm.errors import RecipeError
from pocketvlm.models.layers import LinearSpec
from pocketvlm.weights.layout import (
    AffineLayout,
    LayerBytes,
    SparseLayout,
    WeightLayout,
    plan_behind_mask,
)

__all__ = [
    "CONTAINERS",
    "Container",
    "Option",
    "check_option",
    "count_codes",
    "find_layer_bytes",
    "label_of",
    "plan_option",
    "prior_loss",
]

Option = WeightRule | CodebookRule
"""Every kind of rule that a menu may hold."""

Container = Literal["codes", "onnx", "coreml", "executorch"]
CONTAINERS: tuple[Container, ...] = get_args(Container)

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


def count_codes(layout: WeightLayout | None, shape: tuple[int, int]) -> int:
    """Bytes of a matrix in the checkpoint's own form; floats are bf16, as published."""
    rows, columns = shape
    if layout is None:
        return rows * columns * _FLOAT_BYTES
    return layout.stored_bytes(rows, columns)


def find_layer_bytes(container: Container, targets: Mapping[str, LayerBytes]) -> LayerBytes:
    """What counts the bytes of a layer in a container.

    Args:
        container: `codes`, or the tag of a target.
        targets: What the pipeline passes: one function per target.

    Raises:
        RecipeError: The caller passed none for the target.
    """
    if container == "codes":
        return count_codes
    if container not in targets:
        raise RecipeError(
            f"stored_as {container!r}: nothing here counts bytes of this target; use "
            "compress_checkpoint(), or give RunContext(layer_bytes=...)"
        )
    return targets[container]


def plan_option(option: Option, linear: LinearSpec, density: float | None) -> WeightLayout:
    """What a layer will be stored as, under its mask where it has one.

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
