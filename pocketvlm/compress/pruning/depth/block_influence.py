"""Block influence: how far a block turns the hidden states that pass it.

    BI = 1 - E_t[cos(x_t, y_t)],  x_t entering the block and y_t leaving it, residual included

(ShortGPT, arXiv 2403.03853, equation 1). A block that turns its states by little can be left out at
little cost; one forward pass scores all of them, and the least are removed at once. Ours differs in
three things: the mean is weighted by modality, because an image's tokens outnumber a question's;
sums are float64, because the cosines of a redundant block differ from one in their last digits; and
tower blocks are scored too, among themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pocketvlm.calibration.data.modality import (
    ModalityWeighting,
    TokenCounts,
    check_weighting,
    token_weights,
)
from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.compress.pruning.depth.block_choice import (
    BlockChoice,
    BlockImportance,
    BlockWish,
    Progress,
)
from pocketvlm.compress.pruning.depth.block_path import BlockPath
from pocketvlm.compress.pruning.depth.blocks import Block
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError

__all__ = ["BlockInfluence", "block_influences", "cosines"]


def cosines(entering: Tensor, leaving: Tensor) -> Tensor:
    """Cosine between what enters and what leaves a block, float64 [...], from [..., width].

    A state of zeros has no direction: beside another of zeros it counts as unturned (1), beside
    anything else as turned by a right angle (0).
    """
    before, after = entering.double(), leaving.double()
    lengths = before.norm(dim=-1) * after.norm(dim=-1)
    products = (before * after).sum(dim=-1)
    turned = torch.where(lengths > 0, products / lengths.where(lengths > 0, 1.0), lengths)
    both_zero = ~(before.any(dim=-1) | after.any(dim=-1))
    return torch.where(both_zero, 1.0, turned)


def block_influences(
    path: BlockPath,
    rows: range,
    *,
    removed: Collection[Block],
    weighting: ModalityWeighting,
    counts: TokenCounts,
    on_samples: Callable[[int], None],
) -> Mapping[Block, float]:
    """Influence of every block that is not left out, in one forward pass.

    Args:
        path: The model.
        rows: Which samples.
        removed: Blocks that are left out.
        weighting: How much a visual token counts in the decoder; the tower's tokens count alike,
            [CLS] among them.
        counts: Tokens of both modalities.
        on_samples: Told how many samples ran through.

    Raises:
        CalibrationError: A sample cannot be used, or a hidden state is not finite.
    """
    sums: dict[Block, float] = {}
    weights: dict[Block, float] = {}
    for batch in path.batches(rows):
        state = path.enter(batch)
        for block in path.blocks:
            if block in removed:
                continue
            before = path.reach(block, state)
            state = path.run(block, before)
            found = cosines(path.own(block, before), path.own(block, state))
            if not bool(torch.isfinite(found).all()):
                raise CalibrationError(
                    f"hidden states after block {block.index} of the {block.stack} are not finite"
                )
            wanted = torch.ones_like(found)
            if before.is_visual is not None:
                modal = token_weights(weighting, counts, before.is_visual)
                wanted = wanted if modal is None else modal.double()
            sums[block] = sums.get(block, 0.0) + float((wanted * found).sum())
            weights[block] = weights.get(block, 0.0) + float(wanted.sum())
        on_samples(len(batch))
    return {block: 1 - sums[block] / weights[block] for block in sums}


@dataclass(frozen=True, kw_only=True)
class BlockInfluence(BlockImportance):
    """Removes the blocks of least influence (ShortGPT), all at once.

    Attributes:
        modality_weights: How much visual tokens count in a block's influence; see
            `calibration.modality`. `gradient` is not supported.
    """

    kind: Literal["block_influence"] = "block_influence"
    modality_weights: ModalityWeighting = "uniform"

    def __post_init__(self) -> None:
        check_weighting(self.modality_weights)
        if self.modality_weights == "gradient":
            raise ValueError(
                "modality_weights 'gradient' weighs inputs of layers, not blocks; allowed are "
                "'uniform', 'balanced' or the weight of a visual token"
            )

    def choose(
        self, walk: BlockWalk, path: BlockPath, wish: BlockWish, ctx: RunContext
    ) -> BlockChoice:
        """Measures the model without the named blocks.

        Raises:
            CalibrationError: A sample cannot be used, or a hidden state is not finite.
        """
        rows = range(walk.first_held_out)
        figures = block_influences(
            path,
            rows,
            removed=wish.named,
            weighting=self.modality_weights,
            counts=walk.counts,
            on_samples=Progress(ctx, len(rows)).add,
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
