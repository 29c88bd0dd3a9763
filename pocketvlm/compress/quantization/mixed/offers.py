"""What each layer of a model may become: options that fit it and its mask, or the one of a pin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pocketvlm.compress.quantization.mixed.bit_allocation import Menu
from pocketvlm.compress.quantization.mixed.search_space import Option, plan_option
from pocketvlm.errors import RecipeError
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.selection import assign_rules
from pocketvlm.models.spec import ModelSpec
from pocketvlm.weights.layout import LayerBytes, SparseLayout

__all__ = ["count_float", "loses_mask", "offer_options"]


def offer_options(
    spec: ModelSpec,
    options: Sequence[Option],
    pins: Sequence[Option],
    *,
    float_bytes: Mapping[LinearSpec, int],
    densities: Mapping[str, float],
    layer_bytes: LayerBytes,
) -> Menu:
    """The menu of a model.

    Args:
        spec: The model.
        options: What any layer may become where it fits.
        pins: Rules that fix layers; the first that matches a layer leaves it no choice.
        float_bytes: Bytes of layers that stay float.
        densities: Shares of kept elements by name, for layers under a mask.
        layer_bytes: What a layout takes in the files that are counted.

    Raises:
        RecipeError: A pin matches nothing or does not fit, or no option fits a layer.
    """
    linears = tuple(spec.linears())
    try:
        pinned = assign_rules(pins, linears, field="pins")
    except RecipeError as error:
        raise RecipeError(f"pins: {error}") from error
    offered: dict[LinearSpec, tuple[Option, ...]] = {}
    for linear in linears:
        pin = pinned[linear]
        if pin is not None:
            if not pin.keeps_float:
                plan_option(pin, linear, densities.get(linear.name))
            offered[linear] = (pin,)
            continue
        fitting, refusals = [], []
        for option in options:
            try:
                plan_option(option, linear, densities.get(linear.name))
            except RecipeError as error:
                refusals.append(str(error))
            else:
                fitting.append(option)
        if not fitting:
            raise RecipeError(f"no option fits {linear.name}: {refusals[0]}")
        offered[linear] = tuple(fitting)
    return Menu(
        options=offered,
        float_bytes=float_bytes,
        densities=densities,
        layer_bytes=layer_bytes,
    )


def loses_mask(option: Option, linear: LinearSpec) -> bool:
    """Whether an option fits a layer, but not under a mask."""
    try:
        option.plan(linear)
    except RecipeError:
        return False
    try:
        plan_option(option, linear, 1.0)
    except RecipeError:
        return True
    return False


def count_float(count: LayerBytes, linear: LinearSpec, density: float | None) -> int:
    """Bytes of a layer that stays float, under a mask where it has a density."""
    layout = None if density is None else SparseLayout(density=density)
    return count(layout, (linear.out_features, linear.in_features))
