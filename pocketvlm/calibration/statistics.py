"""Streaming statistics of a layer's inputs: the second moment that GPTQ calls the Hessian."""

from __future__ import annotations

import torch
from torch import Tensor

from pocketvlm.errors import CalibrationError

__all__ = ["SecondMoment"]

_CHUNK = 8192
# Above this width a float64 accumulator would cost more memory than its digits are worth.
_WIDE = 2048


class SecondMoment:
    """Accumulates H = sum_t w_t x_t x_t^T / sum_t w_t over tokens, batch by batch.

    Products are float32, the sum over batches is float64 (float32 for wide layers). The result is
    a mean: it depends neither on the number of samples nor on how they were batched.

    Attributes:
        tokens: Tokens seen.
        total_weight: Sum of their weights.
    """

    def __init__(self, width: int) -> None:
        self._sum = torch.zeros(
            width, width, dtype=torch.float64 if width <= _WIDE else torch.float32
        )
        self.tokens = 0
        self.total_weight = 0.0

    @property
    def width(self) -> int:
        """Channels of the inputs."""
        return self._sum.shape[0]

    def add(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            inputs: [..., width].
            weights: Not negative, [...]; `None` weighs every token one.

        Raises:
            CalibrationError: An input is not finite.
        """
        flat = inputs.reshape(-1, self.width).to(torch.float32)
        shares = None if weights is None else weights.reshape(-1)
        for start in range(0, flat.shape[0], _CHUNK):
            rows = flat[start : start + _CHUNK]
            if shares is not None:
                chosen = shares[start : start + _CHUNK]
                self.total_weight += float(chosen.sum())
                rows = rows * chosen.to(torch.float32).sqrt()[:, None]
            else:
                self.total_weight += rows.shape[0]
            self._sum += rows.T @ rows
        self.tokens += flat.shape[0]
        if not bool(torch.isfinite(self._sum.diagonal()).all()):
            raise CalibrationError("an input of the layer is not finite on the calibration data")

    def mean(self) -> Tensor:
        """The second moment [width, width], symmetric.

        Raises:
            CalibrationError: No token with a positive weight was added.
        """
        if self.total_weight <= 0:
            raise CalibrationError("no calibration token with a positive weight reached the layer")
        return self._sum / self.total_weight
