"""Which blocks a depth pruner takes: those named by hand, of least influence, or greedily."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pocketvlm.calibration.data.modality import ModalityWeighting
from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.compress.pruning.depth.block_influence import block_influences
from pocketvlm.compress.pruning.depth.block_path import BlockPath
from pocketvlm.compress.pruning.depth.blocks import Block, Stack
from pocketvlm.compress.pruning.depth.greedy_blocks import count_trials, remove_greedily
from pocketvlm.context import RunContext
from pocketvlm.models.spec import ModelSpec

__all__ = ["BlockChoice", "BlockWish", "choose_by_influence", "choose_by_loss"]


@dataclass(frozen=True, kw_only=True)
class BlockWish:
    """What is asked for.

    Attributes:
        named: Blocks that go because a recipe names them.
        counts: How many others of each stack go.
        candidates: Blocks that may be chosen.
    """

    named: tuple[Block, ...]
    counts: Mapping[Stack, int]
    candidates: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class BlockChoice:
    """Which blocks go, and why.

    Attributes:
        removed: In the order in which they go, named ones first.
        named: So many of them were named.
        figure: What was measured.
        figures: The last measurement of each block; of a removed one that of its removal.
    """

    removed: tuple[Block, ...]
    named: int
    figure: Literal["influence", "loss"] | None
    figures: Mapping[Block, float]

    def row(self, block: Block, spec: ModelSpec) -> dict[str, Any]:
        """A block's line in the report."""
        step = self.removed.index(block) + 1 if block in self.removed else None
        return {
            "name": block.name(spec),
            "part": block.stack,
            "block": block.index,
            "removed": step is not None,
            "step": step,
            "named": step is not None and step <= self.named,
            **({} if self.figure is None else {self.figure: self.figures.get(block)}),
        }


def choose_by_influence(
    walk: BlockWalk, path: BlockPath, wish: BlockWish, weighting: ModalityWeighting, ctx: RunContext
) -> BlockChoice:
    """Takes the blocks of least influence in the model without the named ones, all at once.

    Raises:
        CalibrationError: A sample cannot be used, or a hidden state is not finite.
    """
    rows = range(walk.first_held_out)
    figures = block_influences(
        path,
        rows,
        removed=wish.named,
        weighting=weighting,
        counts=walk.counts,
        on_samples=_Progress(ctx, len(rows)).add,
    )
    # Stable: of equal influences the block that runs first goes first.
    ranked = sorted(wish.candidates, key=lambda block: figures[block])
    taken: Counter[str] = Counter()
    chosen = []
    for block in ranked:
        if taken[block.stack] < wish.counts[block.stack]:
            taken[block.stack] += 1
            chosen.append(block)
    return BlockChoice(
        removed=(*wish.named, *chosen),
        named=len(wish.named),
        figure="influence",
        figures=figures,
    )


def choose_by_loss(
    walk: BlockWalk, path: BlockPath, wish: BlockWish, ctx: RunContext
) -> BlockChoice:
    """Takes blocks greedily, behind the named ones.

    Raises:
        CalibrationError: A sample has no answer or cannot be used, or a loss is not finite.
    """
    rows = range(walk.first_held_out)
    progress = _Progress(ctx, count_trials(wish.candidates, wish.counts) * len(rows))
    steps = remove_greedily(
        path,
        rows,
        removed=wish.named,
        counts=wish.counts,
        candidates=wish.candidates,
        on_forwards=progress.add,
        folder=ctx.scratch_dir,
    )
    progress.finish()
    return BlockChoice(
        removed=(*wish.named, *(step.removed for step in steps)),
        named=len(wish.named),
        figure="loss",
        figures={block: loss for step in steps for block, loss in step.losses.items()},
    )


class _Progress:
    """Counts forward passes of a sample."""

    def __init__(self, ctx: RunContext, total: int) -> None:
        self._ctx, self._total, self._done = ctx, total, 0

    def add(self, samples: int) -> None:
        self._done += samples
        self._ctx.report("prune_depth", self._done, self._total, "forward passes")

    def finish(self) -> None:
        """The total is the most that it may take: what was not needed counts as done."""
        self.add(self._total - self._done)
