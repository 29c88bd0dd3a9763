"""The stage that removes whole blocks of the decoder and of the tower.

A phone saves all of a block that is gone: its bytes, its time and its share of the KV cache,
whatever the runtime. Which blocks go is a count, filled greedily (SLEB) or by block influence
(ShortGPT), or a list.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.depth.block_choice import (
    BlockChoice,
    BlockImportance,
    BlockWish,
)
from pocketvlm.compress.pruning.depth.block_influence import BlockInfluence
from pocketvlm.compress.pruning.depth.block_path import BlockPath
from pocketvlm.compress.pruning.depth.blocks import (
    STACKS,
    Block,
    Stack,
    count_blocks,
    remove_blocks,
    spec_without,
)
from pocketvlm.compress.pruning.depth.greedy_blocks import Greedy
from pocketvlm.compress.pruning.uniform import require_uniform_decoder, require_uniform_tower
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import PlanState, Stage, StageResult
from pocketvlm.stages.walk_options import note_synthetic

__all__ = ["PruneDepth"]

_GREEDY = Greedy()


@dataclass(frozen=True, kw_only=True)
class PruneDepth(Stage):
    """Removes whole blocks; the rest keep their weights, and stock classes load the result.

    Attributes:
        decoder_blocks: How many blocks of the decoder go, or which, by index.
        tower_blocks: Likewise of the tower; its blocks after the one whose output is read are not
            counted, because nothing runs them.
        importance: What decides which go, where a count is given.
        keep_first: The number of blocks at the start of a stack that are never chosen.
        keep_last: The number at its end.
        held_out: Share of the samples, from the end, on which the answers' loss before and after
            is measured, and nothing else.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"float_weights", "all_tokens"})
    forbids: ClassVar[frozenset[str]] = frozenset(
        {"quantized_weights", "quantized_cache", "reduced_tokens", "merged_tokens"}
    )

    method: Literal["prune_depth"] = "prune_depth"
    decoder_blocks: int | tuple[int, ...] = 0
    tower_blocks: int | tuple[int, ...] = 0
    importance: Greedy | BlockInfluence = _GREEDY
    keep_first: int = 0
    keep_last: int = 0
    held_out: float = 0.125

    def __post_init__(self) -> None:
        for stack in STACKS:
            _check_wish(f"{stack}_blocks", self._wish(stack))
        if not (self.decoder_blocks or self.tower_blocks):
            raise ValueError(
                "decoder_blocks and tower_blocks are both 0: nothing would be removed; give a "
                "count or a list of indices"
            )
        for name, value in (("keep_first", self.keep_first), ("keep_last", self.keep_last)):
            if value < 0:
                raise ValueError(f"{name} is {value}; a number of blocks is at least 0")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; allowed is a share in [0, 1)")

    def spec_after(self, spec: ModelSpec) -> ModelSpec:
        """The specification of the model after this stage, from that before it.

        Raises:
            RecipeError: There are not that many blocks to remove, or those of a stack are of
                several kinds.
        """
        if self.decoder_blocks:
            require_uniform_decoder(spec, self.method)
        if self.tower_blocks:
            require_uniform_tower(spec, self.method)
        return spec_without(spec, {stack: self._count(spec, stack) for stack in STACKS})

    def plan(self, state: PlanState) -> PlanState:
        """Leaves fewer blocks, and notes what the search will cost."""
        state = state.with_spec(self.spec_after(state.spec))
        wishes = (self.decoder_blocks, self.tower_blocks)
        steps = sum(wish for wish in wishes if isinstance(wish, int))
        importance: BlockImportance = self.importance
        return state.with_notes(*importance.plan_notes(steps))

    def compress(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> StageResult:
        """Chooses blocks and rebuilds the model without them.

        Raises:
            RecipeError: There are not that many blocks to remove, or the checkpoint holds what was
                measured on the model with all its blocks.
            CalibrationError: A sample cannot be used or has no answer, or a loss is not finite.
        """
        spec = checkpoint.spec
        _require_whole(checkpoint, self.method)
        after = self.spec_after(spec)
        walk = BlockWalk(checkpoint=checkpoint, samples=calibration, held_out=self.held_out)
        path = BlockPath(checkpoint, calibration, walk.prompts)
        choice = self._choose(walk, path, ctx)
        losses, notes = _held_out_loss(path, walk, choice.removed)
        if choice.figure is not None:
            notes += note_synthetic(calibration)
        return StageResult(
            checkpoint=remove_blocks(checkpoint, choice.removed),
            layers=tuple(choice.row(block, spec) for block in path.blocks),
            metrics={
                "decoder_blocks": after.decoder.depth,
                "decoder_blocks_before": spec.decoder.depth,
                "tower_blocks": count_blocks(after, "tower"),
                "tower_blocks_before": count_blocks(spec, "tower"),
                "weights": _count_weights(after),
                "weights_before": _count_weights(spec),
                "calibration_samples": walk.first_held_out,
                "visual_tokens": walk.counts.visual,
                "text_tokens": walk.counts.text,
                **losses,
                "calibration": calibration.describe(),
            },
            notes=notes,
        )

    def _wish(self, stack: Stack) -> int | tuple[int, ...]:
        return self.decoder_blocks if stack == "decoder" else self.tower_blocks

    def _may_go(self, spec: ModelSpec, block: Block) -> bool:
        """Whether a block may be chosen."""
        last = count_blocks(spec, block.stack) - self.keep_last
        return self.keep_first <= block.index < last

    def _count(self, spec: ModelSpec, stack: Stack) -> int:
        """How many blocks of a stack go.

        Raises:
            RecipeError: It does not have that many to give, or not those.
        """
        depth, wish = count_blocks(spec, stack), self._wish(stack)
        where = f"{self.method}: {stack}_blocks"
        if not isinstance(wish, int):
            missing = [index for index in wish if index >= depth]
            if missing:
                raise RecipeError(
                    f"{where}: there is no block {missing[0]}; allowed are 0 to {depth - 1}"
                )
            if len(wish) == depth:
                raise RecipeError(f"{where}: names all {depth} blocks; one at least has to stay")
            return len(wish)
        most = max(0, min(depth - 1, depth - self.keep_first - self.keep_last))
        if wish > most:
            kept = f", with keep_first {self.keep_first} and keep_last {self.keep_last}"
            raise RecipeError(
                f"{where}: {wish} is more than {depth} blocks have to give"
                f"{kept if self.keep_first or self.keep_last else ''}; allowed are 0 to {most}"
            )
        return wish

    def _choose(self, walk: BlockWalk, path: BlockPath, ctx: RunContext) -> BlockChoice:
        spec = walk.checkpoint.spec
        named: list[Block] = []
        counts: dict[Stack, int] = {}
        for stack in STACKS:
            wish = self._wish(stack)
            counts[stack] = wish if isinstance(wish, int) else 0
            if not isinstance(wish, int):
                named += [Block(stack=stack, index=index) for index in sorted(wish)]
        wanted = BlockWish(
            named=tuple(named),
            counts=counts,
            candidates=tuple(
                block for block in path.blocks if counts[block.stack] and self._may_go(spec, block)
            ),
        )
        if not any(counts.values()):
            return BlockChoice(removed=wanted.named, named=len(named), figure=None, figures={})
        importance: BlockImportance = self.importance
        return importance.choose(walk, path, wanted, ctx)


def _require_whole(checkpoint: Checkpoint, method: str) -> None:
    """Refuses a checkpoint that something was measured on which belongs to all its blocks."""
    found = {
        "reduces its visual tokens": checkpoint.reducer,
        "merges tokens in its tower": checkpoint.spec.tower.merges or None,
        "has a quantized KV cache": checkpoint.cache_grid,
        "drops visual tokens between layers": checkpoint.visual_schedule,
    }
    for what, present in found.items():
        if present is not None:
            raise RecipeError(
                f"{method}: the checkpoint {what}, which belongs to the model with all its blocks; "
                f"move {method} before that stage"
            )


def _held_out_loss(
    path: BlockPath, walk: BlockWalk, removed: Collection[Block]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The answers' loss before and after on samples that chose nothing; and what to note."""
    rows = range(walk.first_held_out, len(walk.samples))
    without = sum(not walk.prompts[row].has_answer for row in rows)
    metrics: dict[str, Any] = {"held_out_samples": len(rows)}
    if without:
        return metrics, (
            f"held-out loss not measured: {without} of {len(rows)} samples have no answer",
        )
    if rows:
        metrics["held_out_loss_before"] = path.mean_loss(rows)
        metrics["held_out_loss_after"] = path.mean_loss(rows, removed)
    return metrics, ()


def _count_weights(spec: ModelSpec) -> int:
    """Elements of all weight matrices."""
    return sum(linear.out_features * linear.in_features for linear in spec.linears())


def _check_wish(name: str, wish: int | tuple[int, ...]) -> None:
    if isinstance(wish, int):
        # `true` would be read as one block.
        if isinstance(wish, bool) or wish < 0:
            raise ValueError(
                f"{name} is {wish}; allowed are a count of at least 0 or a list of indices"
            )
        return
    if any(index < 0 for index in wish):
        raise ValueError(f"{name} holds {min(wish)}; an index is at least 0")
    if len(set(wish)) != len(wish):
        raise ValueError(f"{name} names a block twice: {', '.join(map(str, wish))}")
