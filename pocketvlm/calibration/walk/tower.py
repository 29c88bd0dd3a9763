"""The steps of the vision tower, of what its features become, and of its taps."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pocketvlm.calibration.data.prompts import PromptBatch
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.calibration.walk.activations import join_batches
from pocketvlm.calibration.walk.context import WalkContext
from pocketvlm.calibration.walk.paired_activations import PairedActivations
from pocketvlm.calibration.walk.projector import PairedTokens, walk_projector
from pocketvlm.calibration.walk.shared_batches import SharedBatches
from pocketvlm.calibration.walk.steps import Step
from pocketvlm.calibration.walk.sublayers import walk_sublayer
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.graph.builders import merged_features
from pocketvlm.graph.token_merging import TowerTokens, merge_tokens
from pocketvlm.models.token_merging import TokenMerge
from pocketvlm.reference_graph.forward import (
    VisualTokens,
    embed_patches,
    read_blocks,
    reduce_features,
    tower_features,
)
from pocketvlm.reference_graph.sublayers import tower_sublayers
from pocketvlm.reference_graph.torch_ops import TorchOps
from pocketvlm.reference_graph.tower_states import TowerState, match_after

__all__ = ["walk_tower"]


def walk_tower(
    ctx: WalkContext, samples: CalibrationSet, batches: Sequence[PromptBatch]
) -> Generator[Step, None, PairedTokens]:
    """Yields the steps of the tower and of all that reads it; returns every sample's tokens.

    Args:
        ctx: The walk.
        samples: Whose pictures are seen.
        batches: Which samples a batch holds, of all processes.
    """
    checkpoint, spec = ctx.checkpoint, ctx.checkpoint.spec
    path = ctx.paired()
    for batch in ctx.ranks.own(batches):
        with torch.no_grad():
            pixels = samples.pixels(checkpoint.processor, batch.samples)
            path.append(embed_patches(checkpoint.model, spec, pixels))
    shared = SharedBatches(every=batches, ranks=ctx.ranks)
    used = [batch if batch.in_tower_moments else None for batch in batches]
    measured = SharedBatches(every=used, ranks=ctx.ranks)
    entering: dict[int, _Entering] = {}
    tapped: list[PairedActivations] = []
    tokens: list[TowerTokens] = []
    for block in range(spec.tower.feature_block + 1):
        if block in read_blocks(checkpoint):
            entering[block] = _Entering(path=path.copy(), tokens=tokens)
        merge = spec.tower.merge_in(block)
        before = None if merge is None else path.copy()
        for sublayer in tower_sublayers(checkpoint.model, spec, block):
            yield from walk_sublayer(ctx, sublayer, path, measured, _alike, tokens)
            if merge is not None and before is not None and sublayer.kind == "attention":
                tokens = _merge_tokens(checkpoint, merge, before, path, tokens)
                before.close()
        tapped += [path.copy() for tap in spec.taps if tap.block == block]
    features, indices = _keep_features(ctx, path, tokens, entering)
    path.close()
    for read in entering.values():
        read.path.close()
    visual, ideal = yield from walk_projector(ctx, shared, features, indices, spec.projector.steps)
    for tap, states in zip(spec.taps, tapped, strict=True):
        taken = _take_features(ctx, states, indices)
        states.close()
        rows, wanted = yield from walk_projector(ctx, shared, taken, indices, tap.steps)
        visual = _beside(ctx, visual, rows)
        if ideal is not None and wanted is not None:
            ideal = _beside(ctx, ideal, wanted)
    return visual, ideal


def _alike(_position: Literal["first", "last"], _index: int) -> None:
    """All tokens of the tower weigh the same."""


@torch.no_grad()
def _merge_tokens(
    checkpoint: Checkpoint,
    merge: TokenMerge,
    entering: PairedActivations,
    path: PairedActivations,
    tokens: Sequence[TowerTokens],
) -> list[TowerTokens]:
    """Merges tokens of the tower after the attention of a block; returns what they stand for.

    The float tower might merge others; what is compared are the same ones.
    """
    model, spec = checkpoint.model, checkpoint.spec
    count, after = spec.tower.tokens_after(merge), []
    for number, before in enumerate(tokens or [None] * len(path.now)):
        states = path.now[number]
        target = match_after(model, spec, merge, entering.now[number], states)
        path.now[number], merged = merge_tokens(states, target, count, before)
        if path.ideal is not None:
            path.ideal[number], _ = merge_tokens(path.ideal[number], target, count, before)
        after.append(merged)
    return after


@torch.no_grad()
def _keep_features(
    ctx: WalkContext,
    path: PairedActivations,
    tokens: Sequence[TowerTokens],
    entering: Mapping[int, _Entering],
) -> tuple[PairedActivations, list[Tensor]]:
    """What enters the projector, and which tokens were kept."""
    checkpoint, features = ctx.checkpoint, ctx.paired()
    indices = []
    for number, states in enumerate(path.now):
        stand_for = tokens[number] if tokens else None
        before = {block: read.now(number) for block, read in entering.items()}
        kept, chosen = _reduce(checkpoint, _merge(checkpoint, states, stand_for), before)
        features.now.append(kept)
        indices.append(chosen)
        if path.ideal is None or features.ideal is None:
            continue
        merged = _merge(checkpoint, path.ideal[number], stand_for)
        before = {block: read.ideal(number) for block, read in entering.items()}
        ideal, wanted = _reduce(checkpoint, merged, before)
        if not torch.equal(wanted, chosen):
            # The float tower would keep other tokens; what is compared are the same ones.
            places = chosen[..., None].expand(-1, -1, merged.shape[-1])
            ideal = merged.gather(1, places)
        features.ideal.append(ideal)
    return features, indices


def _merge(checkpoint: Checkpoint, states: Tensor, tokens: TowerTokens | None) -> Tensor:
    """Tower states to what a projector without reduction reads."""
    return tower_features(checkpoint.model, checkpoint.spec, states, tokens).contiguous()


def _reduce(
    checkpoint: Checkpoint, features: Tensor, entering: Mapping[int, TowerState]
) -> tuple[Tensor, Tensor]:
    """The features that are kept, and their indices."""
    kept, indices = reduce_features(checkpoint, features, entering)
    return kept.contiguous(), indices


@torch.no_grad()
def _take_features(
    ctx: WalkContext, path: PairedActivations, indices: Sequence[Tensor]
) -> PairedActivations:
    """What enters the steps of a tap: the merged states of the tokens that are kept."""
    spec = ctx.checkpoint.spec
    ops = TorchOps(ctx.checkpoint.model, spec)

    def taken(states: Tensor, chosen: Tensor) -> Tensor:
        hidden = ops.drop_first(states) if spec.tower.has_cls else states
        return ops.take(merged_features(ops, spec.projector, hidden), chosen).contiguous()

    features = ctx.paired()
    for number, chosen in enumerate(indices):
        features.now.append(taken(path.now[number], chosen))
        if path.ideal is not None and features.ideal is not None:
            features.ideal.append(taken(path.ideal[number], chosen))
    return features


def _beside(ctx: WalkContext, visual: VisualTokens, rows: VisualTokens) -> VisualTokens:
    """The same tokens with further channels."""
    pairs = zip(visual.embeds.split(1), rows.embeds.split(1), strict=True)
    wide = (torch.cat(pair, dim=-1) for pair in pairs)
    return VisualTokens(embeds=join_batches(wide, ctx.spill_folder), indices=visual.indices)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Entering:
    """What entered a block of the tower, batch by batch.

    Attributes:
        path: Hidden states.
        tokens: What their tokens stand for; empty where none was merged.
    """

    path: PairedActivations
    tokens: Sequence[TowerTokens]

    def now(self, number: int) -> TowerState:
        """A batch of the model as it is now."""
        return self._state(self.path.now[number], number)

    def ideal(self, number: int) -> TowerState:
        """A batch of the float model.

        Raises:
            ValueError: It was not carried along.
        """
        if self.path.ideal is None:
            raise ValueError("the float model was not carried along")
        return self._state(self.path.ideal[number], number)

    def _state(self, hidden: Tensor, number: int) -> TowerState:
        return TowerState(hidden=hidden, tokens=self.tokens[number] if self.tokens else None)
