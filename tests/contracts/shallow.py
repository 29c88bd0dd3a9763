"""Tiny models again, with as few blocks as their family allows: one of each kind.

Lowering a program for ExecuTorch takes as long as it has blocks, whatever these hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketvlm.reference.random_models import tiny_config, write_random_model

__all__ = ["shallow_config", "write_shallow_model"]

_KINDS = {
    "lfm2-vl": ["conv", "full_attention"],
    "lfm2-vl-tiles": ["conv", "full_attention"],
    "paligemma2": ["sliding_attention", "full_attention"],
    "gemma3": ["sliding_attention", "full_attention"],
}
"""Blocks of the decoders that have two kinds."""

_WHOLE_TOWERS = ("llava-interleave", "llava-onevision")
"""Towers without [CLS] whose tokens are hardly told apart after one block: which are kept would be
chance, on both sides of a certificate."""


def shallow_config(name: str) -> dict[str, Any]:
    """The config of a tiny model with fewer blocks, by its name in `TINY_MODELS`."""
    config = tiny_config(name)
    text, vision = config["text_config"], config["vision_config"]
    kinds = _KINDS.get(name)
    text["num_hidden_layers"] = 1 if kinds is None else len(kinds)
    if kinds is not None:
        text["layer_types"] = kinds
    # Features that are taken before the last block need one after them.
    blocks = 2 if config.get("vision_feature_layer", -1) != -1 else 1
    if name == "granite-vision":
        config["vision_feature_layer"] = [-2, -1]
    if name == "qwen2.5-vl":  # the first block within windows, the second over all patches
        blocks = 2
    if name == "qwen3-vl":  # rows of one block of the tower, and a block after it on both sides
        vision["deepstack_visual_indexes"] = [0]
        text["num_hidden_layers"] = blocks = 2
    if name not in _WHOLE_TOWERS:
        vision["depth" if "depth" in vision else "num_hidden_layers"] = blocks
    return config


def write_shallow_model(name: str, path: Path) -> None:
    """Writes the model, with the processor that belongs to it."""
    tiles = 3 if name.endswith("-tiles") else 1
    write_random_model(shallow_config(name), path, tiles_per_edge=tiles)
