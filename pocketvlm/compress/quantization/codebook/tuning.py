"""Gradient descent on tables and row scales, with codes fixed, for what a sublayer returns.

VPTQ (arXiv 2409.17066, section 3.4) tunes centroids layer by layer; a sublayer is the smallest
piece whose output the float model knows too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from pocketvlm.calibration.walk.steps import FinishedSublayer
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.layerwise.layer_store import FinishedLayer
from pocketvlm.weights.codebook import CodebookWeight, Lookup
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.modules import cache_dense_weights
from pocketvlm.weights.nonzeros import CodebookNonzeros
from pocketvlm.weights.sparse import SparseWeight

__all__ = ["tune_codebooks"]


def tune_codebooks(
    checkpoint: Checkpoint,
    finished: FinishedSublayer,
    layers: Mapping[str, FinishedLayer],
    *,
    steps: int,
    rate: float,
) -> dict[str, FinishedLayer]:
    """Tunes the layers of a sublayer together; keeps them where held-out tokens agree.

    Args:
        checkpoint: The model; its weights are left as they are.
        finished: The sublayer, with its inputs and the float model's outputs.
        layers: Its layers in codebooks, as the checkpoint holds them.
        steps: Of Adam, each on one batch.
        rate: Of Adam, in units of a table's root mean square; falls to zero linearly.

    Returns:
        All of the layers, with `tuned` in their rows: whether they were kept.
    """
    forms = {name: layer.form for name, layer in layers.items()}
    fitted, judging = _split(finished)
    trained = {
        name: _Trained(form, is_shared=bool(layers[name].row["is_shared"]))
        for name, form in forms.items()
    }
    before = _held_out_loss(checkpoint, finished, judging, forms)
    tuned = forms
    parameters = [value for layer in trained.values() for value in layer.parameters]
    if parameters:
        _descend(checkpoint, finished, fitted, trained, steps=steps, rate=rate)
        tuned = {name: layer.rounded() for name, layer in trained.items()}
    after = _held_out_loss(checkpoint, finished, judging, tuned)
    is_better = after < before
    return {
        name: FinishedLayer(
            form=tuned[name] if is_better else layer.form,
            row={
                **layer.row,
                "tuned": True,
                "tuning_kept": is_better,
                "half_loss_before": before,
                "half_loss_after": after,
            },
        )
        for name, layer in layers.items()
    }


def _descend(
    checkpoint: Checkpoint,
    finished: FinishedSublayer,
    fitted: Sequence[int],
    trained: Mapping[str, _Trained],
    *,
    steps: int,
    rate: float,
) -> None:
    """Adam, one batch a step, at a rate that falls to zero."""
    parameters = [value for layer in trained.values() for value in layer.parameters]
    optimizer = torch.optim.Adam(
        [{"params": [values], "lr": rate * _size(values)} for values in parameters]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        with torch.enable_grad():
            dense = {name: layer.decode() for name, layer in trained.items()}
            with _dense_weights(checkpoint, finished, dense):
                lost, counted = _batch_loss(finished, fitted[step % len(fitted)])
            optimizer.zero_grad()
            (lost / counted).backward()
        optimizer.step()
        schedule.step()


class _Trained:
    """A layer's tables and row scales as parameters, beside its codes and its mask."""

    def __init__(self, stored: WeightForm, *, is_shared: bool) -> None:
        form, self._keeps = _without_mask(stored)
        self._form = form
        self._lookups = [
            _Differentiable(lookup, is_fixed=is_shared)
            for lookup in (form.outliers, form.main, form.residual)
            if lookup is not None
        ]
        self._scales: Tensor | None = None
        if form.row_scales is not None:
            self._scales = form.row_scales.to(torch.float32).requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained."""
        tables = [lookup.table for lookup in self._lookups if lookup.table.requires_grad]
        return tables if self._scales is None else [*tables, self._scales]

    def decode(self) -> Tensor:
        """The dense weight, [rows, columns], as `CodebookWeight` defines it."""
        form, dense = self._form, {id(lookup.lookup): lookup.decode() for lookup in self._lookups}
        values = dense[id(form.main)]
        if form.residual is not None:
            values = values + dense[id(form.residual)]
        if form.outliers is not None:
            values = torch.cat([dense[id(form.outliers)], values], dim=1)
        if form.order is not None:
            values = values[:, torch.argsort(form.order)]
        if self._scales is not None:
            values = values * self._scales[:, None]
        if form.column_scales is not None:
            values = values * form.column_scales.to(torch.float32)
        if form.column_offsets is not None:
            values = values + form.column_offsets.to(torch.float32)
        return values if self._keeps is None else values.masked_fill(~self._keeps, 0.0)

    def rounded(self) -> WeightForm:
        """The layer with its parameters as they are now, in float16."""
        made = {id(lookup.lookup): lookup.rounded() for lookup in self._lookups}
        form = self._form
        rounded = replace(
            form,
            main=made[id(form.main)],
            residual=None if form.residual is None else made[id(form.residual)],
            outliers=None if form.outliers is None else made[id(form.outliers)],
            row_scales=None if self._scales is None else self._scales.detach().to(torch.float16),
        )
        return rounded if self._keeps is None else SparseWeight.from_form(rounded, self._keeps)


def _without_mask(form: WeightForm) -> tuple[CodebookWeight, Tensor | None]:
    """Codebooks with an index for every element, and their mask."""
    if isinstance(form, CodebookWeight):
        return form, None
    if not (isinstance(form, SparseWeight) and isinstance(form.values, CodebookNonzeros)):
        raise TypeError(f"a weight of kind {form.kind!r} has no codebooks to tune")
    keeps, values = form.keeps(), form.values
    indices = torch.zeros(form.shape, dtype=torch.uint8)
    indices[keeps] = form.stored()
    main = Lookup.from_indices(indices, values.codebooks, index_bits=values.index_bits)
    return CodebookWeight(main=main, row_scales=values.row_scales), keeps


class _Differentiable:
    """One look-up whose table may be trained."""

    def __init__(self, lookup: Lookup, *, is_fixed: bool) -> None:
        self.lookup = lookup
        row_groups, column_groups, entries, length = lookup.codebooks.shape
        vectors = lookup.rows // length
        group = torch.arange(vectors) // (vectors // row_groups) * column_groups
        column = torch.arange(lookup.columns) // lookup.group_columns
        self._places = lookup.indices() + (group[:, None] + column) * entries
        table = lookup.codebooks.to(torch.float32).view(-1, length)
        self.table = table if is_fixed else table.requires_grad_()

    def decode(self) -> Tensor:
        """[rows, columns]."""
        values = torch.nn.functional.embedding(self._places, self.table)
        return values.transpose(1, 2).reshape(self.lookup.rows, self.lookup.columns)

    def rounded(self) -> Lookup:
        """The look-up with its table as it is now, in float16."""
        if not self.table.requires_grad:
            return self.lookup
        values = self.table.detach().view(self.lookup.codebooks.shape)
        return replace(self.lookup, codebooks=values.to(torch.float16))


def _split(finished: FinishedSublayer) -> tuple[list[int], list[int]]:
    """Batches that may be fitted, and those that judge; without any held out, the same ones."""
    known = [(index, batch) for index, batch in enumerate(finished.batches) if batch is not None]
    fitted = [index for index, batch in known if not batch.held_out]
    return fitted, [index for index, batch in known if batch.held_out] or fitted


def _batch_loss(finished: FinishedSublayer, index: int) -> tuple[Tensor, float]:
    """Relative squared distance of outputs from the float model's, and the tokens' weight."""
    sublayer = finished.sublayer
    output = sublayer.own(sublayer.output(finished.inputs[index], finished.rows_of(index)))
    target = sublayer.own(finished.targets[index])
    # What follows is a norm: a token's error counts in proportion to the token's own size.
    lost = (output - target).square().mean(-1) / target.square().mean(-1)
    weights = finished.weights_of(index)
    if weights is None:
        return lost.sum(), lost.numel()
    return (lost * weights.view(lost.shape)).sum(), float(weights.sum())


@torch.no_grad()
def _held_out_loss(
    checkpoint: Checkpoint,
    finished: FinishedSublayer,
    judging: Sequence[int],
    forms: Mapping[str, WeightForm],
) -> float:
    dense = {name: form.dequantize() for name, form in forms.items()}
    lost = counted = 0.0
    with _dense_weights(checkpoint, finished, dense):
        for index in judging:
            part, weight = _batch_loss(finished, index)
            lost += float(part)
            counted += weight
    return lost / counted if counted else 0.0


@contextmanager
def _dense_weights(
    checkpoint: Checkpoint, finished: FinishedSublayer, dense: Mapping[str, Tensor]
) -> Iterator[None]:
    """Layers of the sublayer compute with these weights; the others with their own, once."""
    with cache_dense_weights(finished.sublayer.linears):
        for name, values in dense.items():
            checkpoint.layer(name).cached = values
        yield


def _size(values: Tensor) -> float:
    """Root mean square."""
    return float(values.detach().square().mean().sqrt())
