"""Greedy removal: at each step removes the block whose loss hurts the answers least.

SLEB (arXiv 2402.09025, algorithm 1) scores a block by the loss of the model without it *and without
those already removed*, so that of two blocks that do the same work only one is taken for redundant.
Its loss is a text's; ours is that of the answers alone: what the model would say of a question's
words is not part of its work. Where both stacks have blocks to give, blocks of the tower and
of the decoder stand against each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.compress.layerwise.scratch import find_document, keep_document
from pocketvlm.compress.pruning.depth.block_choice import (
    BlockChoice,
    BlockImportance,
    BlockWish,
    Progress,
)
from pocketvlm.compress.pruning.depth.block_path import BlockPath, PathState
from pocketvlm.compress.pruning.depth.blocks import Block, Stack
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError

__all__ = ["Greedy", "GreedyStep", "count_trials", "losses_without", "remove_greedily"]

_FILE = "greedy_blocks.json"


@dataclass(frozen=True, kw_only=True)
class GreedyStep:
    """One removal.

    Attributes:
        removed: The block that went.
        losses: The answers' loss without each block that could have gone.
    """

    removed: Block
    losses: Mapping[Block, float]


def losses_without(
    path: BlockPath,
    rows: range,
    removed: Collection[Block],
    candidates: Collection[Block],
    on_forwards: Callable[[int], None],
) -> dict[Block, float]:
    """Mean loss of the samples' answers without each of some blocks in turn.

    Of a candidate only what comes after it is run, and one forward pass for all of them.

    Args:
        path: The model.
        rows: Which samples.
        removed: Blocks that are left out in any case.
        candidates: Blocks that are tried.
        on_forwards: Told how many more samples ran to their answers.

    Raises:
        CalibrationError: A sample has no answer or cannot be used, or a loss is not finite.
    """
    totals = dict.fromkeys((block for block in path.blocks if block in candidates), 0.0)
    for batch in path.batches(rows):
        state = path.enter(batch)
        for block in path.blocks:
            if block in removed:
                continue
            state = path.reach(block, state)
            if block in totals:
                totals[block] += float(_finish(path, state, block, removed).sum())
                on_forwards(len(batch))
            state = path.run(block, state)
    for block, total in totals.items():
        if not math.isfinite(total):
            raise CalibrationError(
                f"without block {block.index} of the {block.stack}, the answers' loss is not finite"
            )
    return {block: total / len(rows) for block, total in totals.items()}


def remove_greedily(
    path: BlockPath,
    rows: range,
    *,
    removed: Sequence[Block],
    counts: Mapping[Stack, int],
    candidates: Sequence[Block],
    on_forwards: Callable[[int], None],
    folder: Path | None = None,
) -> tuple[GreedyStep, ...]:
    """Removes blocks one after another.

    Args:
        path: The model.
        rows: Which samples.
        removed: Blocks that are gone already.
        counts: How many more of each stack.
        candidates: Blocks that may go.
        on_forwards: Told how many more samples ran to their answers.
        folder: Where finished steps are kept, so that an interrupted run resumes after them.

    Raises:
        CalibrationError: A sample has no answer or cannot be used, or a loss is not finite.
    """
    known = _load(folder, path.blocks)
    left, gone, steps = dict(counts), list(removed), list[GreedyStep]()
    while any(left.values()):
        tried = [block for block in candidates if left[block.stack] and block not in gone]
        if len(steps) < len(known) and known[len(steps)].keys() == set(tried):
            losses = known[len(steps)]
            on_forwards(len(tried) * len(rows))
        else:
            losses = losses_without(path, rows, gone, tried, on_forwards)
        chosen = min(losses, key=lambda block: losses[block])
        steps.append(GreedyStep(removed=chosen, losses=losses))
        gone.append(chosen)
        left[chosen.stack] -= 1
        _save(folder, steps)
    return tuple(steps)


def count_trials(candidates: Sequence[Block], counts: Mapping[Stack, int]) -> int:
    """Most trials that a removal takes; fewer where one of two stacks has given its share early.

    Args:
        candidates: Blocks that may go.
        counts: How many of each stack go.
    """
    trials = sum(counts[block.stack] > 0 for block in candidates)
    steps = sum(counts.values())
    return steps * trials - steps * (steps - 1) // 2


def _finish(
    path: BlockPath, state: PathState, left_out: Block, removed: Collection[Block]
) -> Tensor:
    """Losses of a batch's answers, from the state before a block that is left out."""
    for block in path.blocks[path.blocks.index(left_out) + 1 :]:
        if block not in removed:
            state = path.run(block, path.reach(block, state))
    return path.losses(state)


def _save(folder: Path | None, steps: Sequence[GreedyStep]) -> None:
    if folder is None:
        return
    rows = [
        [
            {"stack": block.stack, "index": block.index, "loss": loss}
            for block, loss in step.losses.items()
        ]
        for step in steps
    ]
    keep_document(folder / _FILE, {"steps": rows})


def _load(folder: Path | None, blocks: Sequence[Block]) -> list[dict[Block, float]]:
    found = None if folder is None else find_document(folder / _FILE)
    if found is None:
        return []
    by_place = {(block.stack, block.index): block for block in blocks}
    return [
        {by_place[row["stack"], row["index"]]: float(row["loss"]) for row in step}
        for step in found["steps"]
    ]


@dataclass(frozen=True, kw_only=True)
class Greedy(BlockImportance):
    """Removes one block after another, each time the one that the answers need least (SLEB)."""

    kind: Literal["greedy"] = "greedy"

    def plan_notes(self, steps: int) -> tuple[str, ...]:
        """How many trials it takes."""
        if not steps:
            return ()
        return (
            f"prune_depth: greedy removal tries every block that may still go in each of {steps} "
            "steps; a trial runs all calibration samples through what comes after the block",
        )

    def choose(
        self, walk: BlockWalk, path: BlockPath, wish: BlockWish, ctx: RunContext
    ) -> BlockChoice:
        """Tries blocks in the model without the named ones.

        Raises:
            CalibrationError: A sample has no answer or cannot be used, or a loss is not finite.
        """
        rows = range(walk.first_held_out)
        progress = Progress(ctx, count_trials(wish.candidates, wish.counts) * len(rows))
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
