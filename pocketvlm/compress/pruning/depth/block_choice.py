"""Which blocks a depth pruner takes: what is asked for, what is chosen, and who chooses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.compress.pruning.depth.block_path import BlockPath
from pocketvlm.compress.pruning.depth.blocks import Block, Stack
from pocketvlm.context import RunContext
from pocketvlm.models.spec import ModelSpec

__all__ = ["BlockChoice", "BlockImportance", "BlockWish", "Progress"]


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
        named: The number of them that were named.
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


class BlockImportance(ABC):
    """What decides which blocks go: a frozen dataclass that is its own configuration."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """The tag that names it in a recipe."""

    @abstractmethod
    def choose(
        self, walk: BlockWalk, path: BlockPath, wish: BlockWish, ctx: RunContext
    ) -> BlockChoice:
        """Fills the counts of a wish.

        Raises:
            CalibrationError: A sample cannot be used, or what is measured is not finite.
        """

    def plan_notes(self, steps: int) -> tuple[str, ...]:
        """What choosing this many blocks will cost, before any compute."""
        return ()


class Progress:
    """Counts forward passes of a sample."""

    def __init__(self, ctx: RunContext, total: int) -> None:
        self._ctx, self._total, self._done = ctx, total, 0

    def add(self, samples: int) -> None:
        """Counts further samples, and reports the progress."""
        self._done += samples
        self._ctx.report("prune_depth", self._done, self._total, "forward passes")

    def finish(self) -> None:
        """The total is the most that it may take: what was not needed counts as done."""
        self.add(self._total - self._done)
