"""Modules whose weight is a `WeightForm`: what stands in a model for its linears and its table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from pocketvlm.weights.form import WeightForm

__all__ = ["FormEmbedding", "FormLinear", "cache_dense_weights"]


class _FormModule(nn.Module):
    """A module with a weight form, which computes on the device that it was moved to.

    The form stays in main memory, or in the file that it is mapped from: a device holds the dense
    weight while it is used.
    """

    _place: Tensor

    def __init__(self, form: WeightForm) -> None:
        super().__init__()
        self.form = form
        self.cached: Tensor | None = None
        self.register_buffer("_place", torch.empty(0), persistent=False)  # moves with the module

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._place.device

    @property
    def weight(self) -> Tensor:
        """The dense weight in float32; computed on each access outside of the cache."""
        return self.dense() if self.cached is None else self.cached

    def dense(self) -> Tensor:
        """The dense weight in float32, unpacked where the module computes."""
        return self.form.dequantize().to(self.device)


class FormLinear(_FormModule):
    """A linear layer whose weight is a `WeightForm`; computes in float32.

    Attributes:
        form: The stored weight; assign a new one to compress the layer.
        bias: float32 [out_features], or `None`.
        cached: The dense weight, while `cache_dense_weights` holds it.
        softcap: Bound c of what it returns, y, as c tanh(y / c); `None` for none.
    """

    def __init__(
        self, form: WeightForm, bias: Tensor | None, *, softcap: float | None = None
    ) -> None:
        super().__init__(form)
        self.softcap = softcap
        self.bias: nn.Parameter | None = None
        if bias is not None:
            self.bias = nn.Parameter(bias.to(torch.float32), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Applies the layer to [..., in_features]."""
        outputs = functional.linear(inputs, self.weight, self.bias)
        if self.softcap is None:
            return outputs
        return torch.tanh(outputs / self.softcap) * self.softcap


class FormEmbedding(_FormModule):
    """A token embedding whose table is a `WeightForm`; returns float32.

    Attributes:
        form: The stored table.
        scale: What its rows are multiplied by.
    """

    def __init__(self, form: WeightForm, *, scale: float = 1.0) -> None:
        super().__init__(form)
        self.scale = scale

    def forward(self, token_ids: Tensor) -> Tensor:
        """Looks up [...] ids, returns [..., width]."""
        if self.cached is None:
            rows = self.form.take_rows(token_ids.cpu()).to(self.device)
        else:
            rows = self.cached[token_ids.to(self.device)]
        return rows if self.scale == 1.0 else rows * self.scale


@contextmanager
def cache_dense_weights(model: nn.Module, *, budget: int | None = None) -> Iterator[None]:
    """Keeps dense weights in memory inside the block, for repeated forward passes.

    Costs four bytes per weight: right for evaluation of small models, wrong while compressing
    large ones. What is not kept is unpacked each time that it is used, to the same values.

    Args:
        model: Whose weights.
        budget: The most bytes that are kept, of the last modules first: a decoder runs for every
            token, a tower for every picture. `None` keeps all.
    """
    modules = [m for m in model.modules() if isinstance(m, FormLinear | FormEmbedding)]
    shared: dict[int, Tensor] = {}
    for module in modules if budget is None else reversed(modules):
        key, size = id(module.form), 4 * math.prod(module.form.shape)
        if key not in shared:
            if budget is not None and size > budget:
                continue
            budget = None if budget is None else budget - size
            shared[key] = module.dense()
        module.cached = shared[key]
    try:
        yield
    finally:
        for module in modules:
            module.cached = None
