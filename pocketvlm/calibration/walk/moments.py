"""Streaming statistics of a layer's inputs: the second moment that GPTQ calls the Hessian."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocketvlm.calibration.walk.activations import MAIN_MEMORY, float64_device
from pocketvlm.context import Ranks
from pocketvlm.errors import CalibrationError

__all__ = ["CrossMoment", "Int8Steps", "SecondMoment"]

_CHUNK = 8192
# Above this width a float64 accumulator would cost more memory than its digits are worth.
_WIDE = 1024
# Panels of a symmetric sum: narrow enough to save products, wide enough for full speed.
_PANEL = 384


@dataclass(frozen=True, kw_only=True)
class Int8Steps:
    """Mean squares, over tokens, of the steps between two codes of an input in int8.

    Attributes:
        tile: Where all tokens of a tile have one scale and zero point.
        row: Where each token has a scale, around zero.
    """

    tile: float
    row: float


class CrossMoment:
    """Accumulates sum_t w_t a_t b_t^T / sum_t w_t over tokens, batch by batch.

    Products are float32, the sum over batches is float64 (float32 for wide layers). The result is
    a mean: it depends neither on the number of samples nor on how they were batched.

    Args:
        width: Channels of the inputs.
        block: Width of diagonal blocks that are kept instead of the full matrix, for inputs whose
            full matrix would not fit; the last block may be narrower.
        device: Where inputs are; sums are where float64 is (`float64_device`).

    Attributes:
        width: Channels of the inputs.
        tokens: Tokens seen.
        total_weight: Sum of their weights.
    """

    _is_symmetric = False

    def __init__(
        self, width: int, *, block: int | None = None, device: torch.device = MAIN_MEMORY
    ) -> None:
        self.width = width
        self.device = float64_device(device)
        self.tokens = 0
        self.total_weight = 0.0
        self._is_mean = False
        step = width if block is None else block
        self._slices = tuple(
            slice(start, min(start + step, width)) for start in range(0, width, step)
        )
        dtype = torch.float64 if width <= _WIDE else torch.float32
        self._sums = [
            torch.zeros(
                part.stop - part.start, part.stop - part.start, dtype=dtype, device=self.device
            )
            for part in self._slices
        ]

    @property
    def slices(self) -> tuple[slice, ...]:
        """Channels of each diagonal block; one slice where the matrix is full."""
        return self._slices

    def add_pairs(self, left: Tensor, right: Tensor, weights: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            left: a_t, [..., width].
            right: b_t, [..., width].
            weights: Not negative, [...]; `None` weighs every token one.

        Raises:
            CalibrationError: An input is not finite.
            ValueError: The mean was taken already.
        """
        if self._is_mean:
            raise ValueError("nothing can be added once the mean was taken")
        is_same = left is right
        flat = left.reshape(-1, self.width).to(torch.float32)
        other = flat if is_same else right.reshape(-1, self.width).to(torch.float32)
        shares = None if weights is None else weights.reshape(-1).to(torch.float32)
        for start in range(0, flat.shape[0], _CHUNK):
            rows = flat[start : start + _CHUNK]
            pairs = rows if is_same else other[start : start + _CHUNK]
            if shares is None:
                self.total_weight += rows.shape[0]
            else:
                chosen = shares[start : start + _CHUNK]
                self.total_weight += float(chosen.to(self.device).sum(dtype=torch.float64))
                # The root on either side keeps the second moment symmetric to the last bit.
                roots = chosen.sqrt()[:, None]
                rows = rows * roots
                pairs = rows if is_same else pairs * roots
            for part, total in zip(self._slices, self._sums, strict=True):
                for panel in self._panels(total):
                    target = total[panel, panel.start if self._is_symmetric else 0 :]
                    first = rows[:, part][:, panel]
                    second = pairs[:, part][:, -target.shape[1] :]
                    if total.dtype == rows.dtype and total.device == rows.device:
                        target.addmm_(first.T, second)
                    else:
                        target.add_((first.T @ second).to(self.device))
        self.tokens += flat.shape[0]
        if not all(bool(torch.isfinite(total.diagonal()).all()) for total in self._sums):
            raise CalibrationError("an input is not finite on the calibration data")

    def join(self, ranks: Ranks) -> None:
        """Adds what the other ranks have summed, rank by rank; all of them have the total then."""
        if ranks.count == 1:
            return
        counted = self._counted()
        ranks.add_up(counted)
        self._set_counted(counted)
        for number, total in enumerate(self._sums):
            values = total.cpu()
            ranks.add_up(values.numpy())
            self._sums[number] = values.to(self.device)

    def move(self, device: torch.device) -> None:
        """Moves the sums to another device."""
        self.device = float64_device(device)
        self._sums = [total.to(self.device) for total in self._sums]

    def _counted(self) -> NDArray[np.float64]:
        """Every sum beside the moment, as one array."""
        return np.array([self.tokens, self.total_weight])

    def _set_counted(self, values: NDArray[np.float64]) -> None:
        self.tokens, self.total_weight = int(values[0]), float(values[1])

    def blocks(self) -> tuple[Tensor, ...]:
        """The diagonal blocks of the moment.

        The sums become means in place, so that no second copy is ever held.

        Raises:
            CalibrationError: No token with a positive weight was added.
        """
        if self.total_weight <= 0:
            raise CalibrationError("no calibration token with a positive weight was seen")
        if not self._is_mean:
            for total in self._sums:
                total.div_(self.total_weight)
                for panel in self._panels(total) if self._is_symmetric else ():
                    total[panel.stop :, panel] = total[panel, panel.stop :].T
            self._is_mean = True
        return tuple(self._sums)

    def _panels(self, total: Tensor) -> list[slice]:
        """Rows that are summed together; of a symmetric matrix only what lies right of them."""
        step = _PANEL if self._is_symmetric else total.shape[0]
        return [slice(start, start + step) for start in range(0, total.shape[0], step)]


class SecondMoment(CrossMoment):
    """Accumulates H = sum_t w_t x_t x_t^T / sum_t w_t: symmetric, and GPTQ's Hessian up to 2.

    What lies below the panels of the diagonal is mirrored, not computed.
    """

    _is_symmetric = True

    def __init__(
        self, width: int, *, block: int | None = None, device: torch.device = MAIN_MEMORY
    ) -> None:
        super().__init__(width, block=block, device=device)
        self._inputs = torch.zeros(width, dtype=torch.float64, device=self.device)
        self._tile_steps = self._row_steps = 0.0

    def add(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Adds a batch of inputs [..., width]; see `add_pairs`."""
        self.add_pairs(inputs, inputs, weights)
        flat = inputs.reshape(-1, self.width).to(torch.float32)
        shares = flat.new_ones(flat.shape[0]) if weights is None else weights.reshape(-1)
        shares = shares.to(torch.float32)
        self._inputs += (shares @ flat).to(self.device)
        tiles = flat.reshape(inputs.shape[0] if inputs.dim() > 2 else 1, -1)  # noqa: PLR2004  (axes)
        low, high = torch.aminmax(tiles, dim=1)
        spans = (high.clamp_min(0) - low.clamp_max(0)).repeat_interleave(len(flat) // len(tiles))
        self._tile_steps += float(shares @ (spans / 255).square())
        self._row_steps += float(shares @ (flat.abs().amax(dim=1) / 127).square())

    def move(self, device: torch.device) -> None:
        """Moves the sums to another device."""
        super().move(device)
        self._inputs = self._inputs.to(self.device)

    def _counted(self) -> NDArray[np.float64]:
        steps = [self._tile_steps, self._row_steps]
        return np.concatenate([super()._counted(), steps, self._inputs.cpu().numpy()])

    def _set_counted(self, values: NDArray[np.float64]) -> None:
        super()._set_counted(values)
        self._tile_steps, self._row_steps = float(values[2]), float(values[3])
        self._inputs = torch.from_numpy(values[4:]).to(self.device)

    def int8_steps(self) -> Int8Steps:
        """The steps to which int8 kernels would round the inputs.

        Raises:
            CalibrationError: No token with a positive weight was added.
        """
        if self.total_weight <= 0:
            raise CalibrationError("no calibration token with a positive weight was seen")
        return Int8Steps(
            tile=self._tile_steps / self.total_weight, row=self._row_steps / self.total_weight
        )

    def mean(self) -> Tensor:
        """sum_t w_t x_t / sum_t w_t, float64 [width].

        Raises:
            CalibrationError: No token with a positive weight was added.
        """
        if self.total_weight <= 0:
            raise CalibrationError("no calibration token with a positive weight was seen")
        return self._inputs / self.total_weight
