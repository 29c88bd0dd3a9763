"""What is added to a weight in training: nothing ever where its mask has a zero.

A plain low-rank update (LoRA, Hu et al., arXiv 2106.09685) fills a pruned matrix when it is merged.
SparseLoRA (RESSA, He et al., arXiv 2404.02424) puts the mask on the product, W + M * (B A), so that
what is merged has the zeros that the pruned weight had.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pocketvlm.calibration.walk.activations import MAIN_MEMORY
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.float_weights import is_float, keeps_of, with_values
from pocketvlm.weights.form import WeightForm

__all__ = ["MaskedUpdate", "low_rank_update"]


def low_rank_update(down: Tensor, up: Tensor, keeps: Tensor | None) -> Tensor:
    """The update M * (B A) / sqrt(rank), [rows, columns].

    Divided by the root of the rank, an update of any rank moves at one rate (rsLoRA, Kalajdzievski,
    arXiv 2312.03732, with alpha 1).

    Args:
        down: A, [rank, columns].
        up: B, [rows, rank].
        keeps: M, bool [rows, columns]; `None` where nothing is masked.
    """
    product = up @ (down * down.shape[0] ** -0.5)
    return product if keeps is None else product * keeps


class MaskedUpdate:
    """A float weight with an update that is trained.

    Args:
        form: The weight: dense, or masked.
        rank: Of the update; `None` for an update of all elements, which costs as much memory for
            gradients and moments as three further copies of the weight.
        generator: Where a low-rank update's first factor is drawn from. The second is zero, so
            that training starts at the weight itself.
        device: Where it is trained.

    Attributes:
        form: The weight as it was.
        rank: Of the update; `None` where a low rank would hold no fewer numbers than the matrix.
        factors: What is trained, by name.
    """

    def __init__(
        self,
        form: WeightForm,
        rank: int | None,
        generator: torch.Generator,
        device: torch.device = MAIN_MEMORY,
    ) -> None:
        if not is_float(form):
            raise TypeError(f"a weight of kind {form.kind!r} is not stored as floats")
        self.form = form
        keeps = keeps_of(form)
        self._keeps = None if keeps is None else keeps.to(device)
        # A mask is unpacked once; its floats stay in 16 bits and are widened where they are used.
        self._values = (
            form.values if isinstance(form, DenseWeight) else form.dequantize().to(torch.float16)
        ).to(device)
        rows, columns = form.shape
        if rank is not None and rank * (rows + columns) >= rows * columns:
            rank = None
        self.rank = rank
        if rank is None:
            self.factors = {"update": torch.zeros(rows, columns)}
        else:
            drawn = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
            self.factors = {"down": drawn, "up": torch.zeros(rows, rank)}
        self.factors = {
            name: factor.to(device).requires_grad_() for name, factor in self.factors.items()
        }

    def weight(self) -> Tensor:
        """The updated weight in float32, [rows, columns]; autograd may record it."""
        return self._values.to(torch.float32) + self.update()

    def update(self) -> Tensor:
        """What is added, [rows, columns]; exactly zero outside of the mask."""
        if self.rank is not None:
            return low_rank_update(self.factors["down"], self.factors["up"], self._keeps)
        whole = self.factors["update"]
        return whole if self._keeps is None else whole * self._keeps

    @torch.no_grad()
    def merged(self) -> WeightForm:
        """The updated weight as it is stored: of the same kind, type and mask.

        Raises:
            UnsupportedError: A value is too large for a masked weight's float16.
        """
        return with_values(self.form, self.weight().cpu())
