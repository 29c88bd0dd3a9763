"""Limits of a config.json: sizes that no model has are refused before a library allocates for them.

A configuration of a billion layers costs its author one line and its reader all memory: the library
makes lists as long as a size says, and a module for each item.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pocketvlm.errors import CheckpointError

__all__ = ["check_sizes"]

_MAX_DEPTH = 24
_MAX_VALUES = 100_000
_LARGEST = 2**40
_SIZES: Mapping[str, int] = {
    "num_hidden_layers": 512,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "projection_dim": 2**17,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 2**14,
    "vocab_size": 2**22,
    "max_position_embeddings": 2**26,
    "image_size": 2**14,
    "patch_size": 2**12,
    "num_channels": 64,
    "scale_factor": 64,
    "image_seq_length": 2**20,
}
"""Whole numbers of at least 1, by names that every family uses, with the largest allowed value."""


def check_sizes(config: Mapping[str, Any], where: str) -> None:
    """Checks every size and model type of a configuration, at any depth.

    Args:
        config: Content of a config.json.
        where: The file, for the message.

    Raises:
        CheckpointError: A model type is not a string, or a size is not a whole number or larger
            than that of any model; the message has its path.
    """
    for count, (path, key, value) in enumerate(_values(config, "", 0, where)):
        if count > _MAX_VALUES:
            raise CheckpointError(f"{where}: holds more than {_MAX_VALUES:,} values")
        if key == "model_type" and not isinstance(value, str | None):
            raise CheckpointError(f"{where}: {path}: must be the name of a model type")
        most = _SIZES.get(key)
        if most is not None and value is not None:
            # A list of sizes, such as an image's height and width, is checked by the family's
            # reader.
            sizes = value if isinstance(value, list) else [value]
            if not all(type(size) is int and 1 <= size <= most for size in sizes):
                shown = repr(value) if len(repr(value)) <= 60 else "something else"  # noqa: PLR2004
                raise CheckpointError(
                    f"{where}: {path}: must be a whole number from 1 to {most:,}, not {shown}"
                )
        elif type(value) in (int, float) and not abs(value) <= _LARGEST:  # false for NaN as well
            raise CheckpointError(f"{where}: {path}: is a number out of range")


def _values(value: Any, path: str, depth: int, where: str) -> Iterator[tuple[str, str, Any]]:
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"{where}: is nested more than {_MAX_DEPTH} levels deep")
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, item in items:
        here = f"{path}.{key}" if path else str(key)
        yield here, str(key), item
        if isinstance(item, Mapping | list):
            yield from _values(item, here, depth + 1, where)
