"""Whole transformer blocks: which can be removed, and the model without them.

The result is a stock model with fewer blocks: the residual stream runs past a removed block, and
the blocks after it are renumbered, so that `layer_idx` and the KV cache have no gaps.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import RecipeError
from pocketvlm.models.spec import ModelSpec
from pocketvlm.weights.modules import FormEmbedding, FormLinear

__all__ = [
    "STACKS",
    "Block",
    "Stack",
    "all_blocks",
    "config_without",
    "count_blocks",
    "remove_blocks",
    "spec_without",
]

Stack = Literal["tower", "decoder"]
STACKS: tuple[Stack, ...] = ("tower", "decoder")
"""The two stacks of blocks, in order of execution."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One transformer block that the phone would run.

    Attributes:
        stack: Which stack it belongs to.
        index: Its index there.
    """

    stack: Stack
    index: int

    def name(self, spec: ModelSpec) -> str:
        """Its module's name."""
        return f"{_list_name(spec, self.stack)}.{self.index}"


def count_blocks(spec: ModelSpec, stack: Stack) -> int:
    """Blocks of a stack that are run; those after the tower's feature block are not."""
    return spec.decoder.depth if stack == "decoder" else spec.tower.feature_block + 1


def all_blocks(spec: ModelSpec) -> tuple[Block, ...]:
    """Every block that is run, in order of execution."""
    return tuple(
        Block(stack=stack, index=index)
        for stack in STACKS
        for index in range(count_blocks(spec, stack))
    )


def spec_without(spec: ModelSpec, removed: Mapping[Stack, int]) -> ModelSpec:
    """The specification with that many blocks fewer, by stack: those that stay are renumbered."""
    tower, decoder = removed.get("tower", 0), removed.get("decoder", 0)
    kinds = {spec.decoder.sliding_of(block) for block in range(spec.decoder.depth)}
    if decoder and len(kinds) > 1:
        raise RecipeError(
            "prune_depth: layers of this decoder differ in how far they see, and are what they are "
            "by their number; allowed are blocks of the tower"
        )
    return replace(
        spec,
        tower=replace(
            spec.tower,
            blocks=spec.tower.blocks[: spec.tower.depth - tower],
            feature_block=spec.tower.feature_block - tower,
        ),
        decoder=replace(spec.decoder, blocks=spec.decoder.blocks[: spec.decoder.depth - decoder]),
    )


def config_without(
    config: Mapping[str, Any], spec: ModelSpec, removed: Mapping[Stack, int]
) -> dict[str, Any]:
    """Content of config.json with that many blocks fewer, by stack.

    LLaVA says which hidden state feeds the projector. Counted from the end it stays where it is,
    because the blocks after it stay; counted from the front it moves with the blocks that go.
    """
    after = spec_without(spec, removed)
    changed = dict(config)
    for section, before, depth in (
        ("vision_config", spec.tower.depth, after.tower.depth),
        ("text_config", spec.decoder.depth, after.decoder.depth),
    ):
        if depth != before:
            changed[section] = {**config.get(section, {}), "num_hidden_layers": depth}
    layer = config.get("vision_feature_layer")
    if isinstance(layer, int) and layer >= 0:
        changed["vision_feature_layer"] = layer - removed.get("tower", 0)
    return changed


def remove_blocks(checkpoint: Checkpoint, removed: Collection[Block]) -> Checkpoint:
    """The checkpoint without some of its blocks; all other weights stay as they are.

    Raises:
        ValueError: A block is not one of the model's, or a stack would be empty.
    """
    spec = checkpoint.spec
    unknown = set(removed) - set(all_blocks(spec))
    if unknown:
        raise ValueError(f"the model has no {min(block.name(spec) for block in unknown)}")
    counts = {stack: sum(block.stack == stack for block in set(removed)) for stack in STACKS}
    for stack, count in counts.items():
        if count == count_blocks(spec, stack):
            raise ValueError(f"no block of the {stack} would be left")
    forms = {
        name: module.form
        for name, module in checkpoint.model.named_modules()
        if isinstance(module, FormLinear | FormEmbedding)
    }
    return checkpoint.rebuild(
        config_without(checkpoint.config, spec, counts),
        _renumber(forms, spec, removed),
        _renumber(checkpoint.vectors(), spec, removed),
    )


def _list_name(spec: ModelSpec, stack: Stack) -> str:
    return spec.decoder.stack if stack == "decoder" else spec.tower.stack


def _renumber(
    entries: Mapping[str, T], spec: ModelSpec, removed: Collection[Block]
) -> dict[str, T]:
    """Entries under the names that they have once blocks are gone; those of the gone are left out.

    Blocks of the tower that are never run keep their place at its end.
    """
    for stack in STACKS:
        gone = sorted({block.index for block in removed if block.stack == stack})
        pattern = re.compile(re.escape(_list_name(spec, stack)) + r"\.(\d+)(\..*)")
        renamed: dict[str, T] = {}
        for name, entry in entries.items():
            found = pattern.fullmatch(name)
            if found is None:
                renamed[name] = entry
            elif (index := int(found[1])) not in gone:
                place = index - sum(other < index for other in gone)
                renamed[f"{_list_name(spec, stack)}.{place}{found[2]}"] = entry
        entries = renamed
    return dict(entries)
