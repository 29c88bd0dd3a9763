"""A checkpoint whose weights are trained: an update a layer, and the vectors between layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.distillation.masked_update import MaskedUpdate
from pocketvlm.context import derive_seed
from pocketvlm.errors import RecipeError
from pocketvlm.models.layers import LinearSpec, Part
from pocketvlm.models.spec import ModelSpec
from pocketvlm.weights.float_weights import is_float
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.modules import cache_dense_weights

__all__ = ["Student"]


class Student:
    """The trained parameters of a checkpoint, and its weights made of them.

    The checkpoint's forms stay as they are until `merge`; its vectors are trained in place. An
    element of a vector that is exactly zero stays zero, as a masked weight's does: it belongs to a
    channel that was removed.

    Args:
        checkpoint: The model.
        parts: Parts whose layers are trained.
        rank: Of the layers' updates; `None` for whole matrices.
        trains_vectors: Whether norms and biases of these parts are trained.
        seed: Of the updates' first factors.

    Raises:
        RecipeError: A layer that would be trained is not stored as floats, or there is none.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        parts: Sequence[Part],
        rank: int | None,
        trains_vectors: bool,
        seed: int,
    ) -> None:
        self.checkpoint = checkpoint
        self._linears = [item for item in checkpoint.spec.linears() if item.part in parts]
        self.updates = {
            linear.name: MaskedUpdate(
                _float_form(checkpoint, linear),
                rank,
                torch.Generator().manual_seed(derive_seed(seed, f"distill {linear.name}")),
                checkpoint.device,
            )
            for linear in self._linears
        }
        self.vectors: dict[str, nn.Parameter] = {}
        if trains_vectors:
            self.vectors = {
                name: parameter
                for name, parameter in checkpoint.model.named_parameters()
                if parameter.ndim == 1 and _part_of(name, checkpoint.spec) in parts
            }
        self._before = {name: vector.detach().clone() for name, vector in self.vectors.items()}
        self._alive = {name: vector != 0 for name, vector in self._before.items()}

    def parameters(self) -> dict[str, Tensor]:
        """Everything that is trained, by name."""
        factors = {
            f"{name}.{factor}": values
            for name, update in self.updates.items()
            for factor, values in update.factors.items()
        }
        return factors | self.vectors

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside, autograd records vectors, and every weight that is not trained is dense."""
        model = self.checkpoint.model
        try:
            for vector in self.vectors.values():
                vector.requires_grad_()
            with cache_dense_weights(model):
                yield
        finally:
            for vector in self.vectors.values():
                vector.requires_grad = False

    @contextmanager
    def updated_weights(self) -> Iterator[None]:
        """The layers compute with their updated weights, which autograd records."""
        with self._weights({name: update.weight() for name, update in self.updates.items()}):
            yield

    @contextmanager
    def stored_weights(self) -> Iterator[None]:
        """The layers compute with what `merge` would store, rounded as it would be."""
        device = self.checkpoint.device
        merged = {
            name: update.merged().dequantize().to(device) for name, update in self.updates.items()
        }
        with self._weights(merged):
            yield

    @contextmanager
    def _weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        layers = {name: self.checkpoint.layer(name) for name in weights}
        try:
            for name, layer in layers.items():
                layer.cached = weights[name]
            yield
        finally:
            for layer in layers.values():
                layer.cached = None

    def keep_zeros(self) -> None:
        """Takes away the gradient of what has to stay zero."""
        for name, vector in self.vectors.items():
            if vector.grad is not None:
                vector.grad *= self._alive[name]

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of everything that is trained."""
        return {name: values.detach().clone() for name, values in self.parameters().items()}

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Goes back to a snapshot."""
        for name, parameter in self.parameters().items():
            parameter.copy_(values[name])

    @torch.no_grad()
    def merge(self) -> list[dict[str, Any]]:
        """Puts the updated weights into the checkpoint.

        Returns:
            One row per layer and one per vector: how far it moved, relative to its own size.
        """
        rows: list[dict[str, Any]] = []
        for linear in self._linears:
            update = self.updates[linear.name]
            form = update.merged()
            before = update.form.dequantize()
            rows.append(
                {
                    "name": linear.name,
                    "part": linear.part,
                    "role": linear.role,
                    "block": linear.block,
                    "method": "distill",
                    "form": form.kind,
                    "rank": update.rank,
                    "trained": sum(values.numel() for values in update.factors.values()),
                    "update_norm": _distance(form.dequantize(), before),
                    "bits_per_weight": form.bits_per_weight,
                    "stored_bytes": form.stored_bytes,
                }
            )
            self.checkpoint.set_form(linear.name, form)
        for name, vector in self.vectors.items():
            rows.append(
                {
                    "name": name,
                    "part": _part_of(name, self.checkpoint.spec),
                    "method": "distill",
                    "form": "vector",
                    "trained": int(self._alive[name].sum()),
                    "update_norm": _distance(vector.detach(), self._before[name]),
                }
            )
        return rows


def _float_form(checkpoint: Checkpoint, linear: LinearSpec) -> WeightForm:
    form = checkpoint.form(linear.name)
    if not is_float(form):
        raise RecipeError(
            f"distill: {linear.name} is stored as {form.kind!r}; only float weights are trained, "
            "so distill stands before every quantizer"
        )
    return form


def _part_of(name: str, spec: ModelSpec) -> Part:
    """The part that a vector belongs to, by its name."""
    if name.startswith(spec.tower.prefix + "."):
        return "tower"
    if name.startswith(spec.decoder.prefix + "."):
        return "decoder"
    return "projector"


def _distance(now: Tensor, before: Tensor) -> float:
    now, before = now.cpu().double(), before.cpu().double()
    size = float(before.norm())
    moved = float((now - before).norm())
    return moved / size if size else moved
