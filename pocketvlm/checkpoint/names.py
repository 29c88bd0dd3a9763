"""Names: which weight of the current model a stored tensor is, as stock transformers decides.

Releases of transformers have used different names for some models, and read them all. The table of
renamings is the library's own, used rather than copied, so that whatever it loads is loaded here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

from pocketvlm.checkpoint.build import build_skeleton

__all__ = ["split_layer", "stock_names"]

_RECOMPUTED = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")


def stock_names(
    config: Mapping[str, Any], stored: Iterable[str]
) -> tuple[dict[str, str | None], dict[str, tuple[int, ...]]]:
    """The current name of each stored tensor, and the weights that the model has.

    A tensor of a quantized layer (`qweight`, `scales`) is named as the layer's weight would be.

    Args:
        config: Content of config.json.
        stored: Names in the weight files.

    Returns:
        The name in the current model by stored name, `None` for a tensor that has no place in it,
        without the buffers that the model computes itself; and the shape of each weight of the
        model by name.

    Raises:
        CheckpointError: The config cannot be understood.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    model = build_skeleton(config)
    expected = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def rename(name: str) -> str:
        prefix = model.base_model_prefix
        found, _ = rename_source_key(name, renamings, converters, prefix, expected)
        if found not in expected and name in expected:
            # Names that need no renaming, except perhaps for the prefix: stock's second try.
            found, _ = rename_source_key(name, [], [], prefix, expected)
        return str(found)

    names: dict[str, str | None] = {}
    for name in stored:
        if not _RECOMPUTED.search(name):
            found = rename(name)
            names[name] = found if found in expected else _name_of_a_part(name, rename, expected)
    return names, {name: tuple(value.shape) for name, value in expected.items()}


def split_layer(name: str) -> Iterator[tuple[str, str]]:
    """Every way to split a tensor's name into a layer and one of its parts, longest layer first."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        yield ".".join(parts[:end]), ".".join(parts[end:])


def _name_of_a_part(
    name: str, rename: Callable[[str], str], expected: Container[str]
) -> str | None:
    """The current name of a quantized layer's tensor (`qweight`, `centroids.weight`)."""
    for layer, rest in split_layer(name):
        whole = rename(f"{layer}.weight")
        if whole in expected:
            return f"{whole.removesuffix('.weight')}.{rest}"
    return None
