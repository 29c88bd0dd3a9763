"""Names: which weight of today's model a stored tensor is, as stock transformers decides it.

Every release of transformers wrote some models under other names and reads them all. The table of
renamings is the library's own, asked instead of copied, so that what it loads is loaded here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pocketvlm.checkpoint.build import build_skeleton

__all__ = ["stock_names"]

_RECOMPUTED = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")


def stock_names(
    config: Mapping[str, Any], stored: Iterable[str]
) -> tuple[dict[str, str | None], dict[str, tuple[int, ...]]]:
    """Today's name of each stored tensor, and the weights that the model has.

    A tensor of a quantized layer (`qweight`, `scales`) is named as the layer's weight would be.

    Args:
        config: Content of config.json.
        stored: Names in the weight files.

    Returns:
        The name in today's model by stored name, `None` for what has no place in it, without the
        buffers that the model computes itself; and the shape of each weight of the model by name.

    Raises:
        CheckpointError: The config cannot be understood.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    model = build_skeleton(config)
    expected = model.state_dict()
    modules = {name.rpartition(".")[0] for name in expected}
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def rename(name: str) -> str:
        prefix = model.base_model_prefix
        found, _ = rename_source_key(name, renamings, converters, prefix, expected)
        if found not in expected and name in expected:
            # A name that needed no renaming, save perhaps for the prefix: stock's own second try.
            found, _ = rename_source_key(name, [], [], prefix, expected)
        return str(found)

    names: dict[str, str | None] = {}
    for name in stored:
        if _RECOMPUTED.search(name):
            continue
        found = rename(name)
        if found not in expected:
            layer, _, last = name.rpartition(".")
            found = f"{rename(f'{layer}.weight').rpartition('.')[0]}.{last}"
            if found.rpartition(".")[0] not in modules:
                names[name] = None
                continue
        names[name] = found
    return names, {name: tuple(value.shape) for name, value in expected.items()}
