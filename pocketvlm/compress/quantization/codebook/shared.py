"""Codebooks of several layers: who shares them, how they are made, and that they are stored once.

In a small layer a table of its own costs as much as a bit of every index. Layers of one part under
one rule may read the same one, which is fitted to all of them before the walk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.codebook.kmeans import cluster, sample_rows
from pocketvlm.compress.quantization.codebook.normalization import row_scales_of
from pocketvlm.compress.quantization.codebook.rules import CodebookRule
from pocketvlm.compress.quantization.rules import LayerRule
from pocketvlm.errors import RecipeError
from pocketvlm.models.layers import LinearSpec, Part
from pocketvlm.weights.codebook import CodebookWeight
from pocketvlm.weights.float_weights import keeps_of
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.layout import CodebookLayout, SparseLayout, WeightLayout
from pocketvlm.weights.nonzeros import CodebookNonzeros
from pocketvlm.weights.sparse import SparseWeight

__all__ = [
    "SharedKey",
    "assign_owners",
    "count_shared_once",
    "disown",
    "fit_shared_codebooks",
    "share_codebooks",
    "shared_key",
]

SharedKey = tuple[CodebookRule, Part]
"""Names codebooks: all layers of a part under one rule read the same."""

_SAMPLE = 1 << 16


def shared_key(rule: LayerRule | None, linear: LinearSpec) -> SharedKey | None:
    """Which shared codebooks a layer reads under a rule; `None` where it shares none."""
    if not isinstance(rule, CodebookRule) or rule.keeps_float or not rule.plan(linear).is_shared:
        return None
    return rule, linear.part


def disown(form: WeightLayout) -> WeightLayout:
    """A layer's plan with codebooks left to be counted elsewhere, where it shares them."""
    if isinstance(form, SparseLayout) and isinstance(form.values, CodebookLayout):
        return replace(form, values=replace(form.values, owns_codebooks=not form.values.is_shared))
    if isinstance(form, CodebookLayout):
        return replace(form, owns_codebooks=not form.is_shared)
    return form


def assign_owners(
    planned: Mapping[LinearSpec, tuple[LayerRule | None, WeightLayout | None]],
) -> dict[LinearSpec, WeightLayout | None]:
    """Plans of all layers of a model; shared codebooks count at the first that reads them."""
    owned: set[SharedKey] = set()
    made: dict[LinearSpec, WeightLayout | None] = {}
    for linear, (rule, form) in planned.items():
        key = shared_key(rule, linear)
        made[linear] = form if form is None or key not in owned else disown(form)
        if key is not None:
            owned.add(key)
    return made


def fit_shared_codebooks(
    checkpoint: Checkpoint, readers: Iterable[tuple[LayerRule | None, LinearSpec]], seed: int
) -> dict[SharedKey, Tensor]:
    """Codebooks of all layers that share some, from the weights as they are.

    Args:
        checkpoint: The model.
        readers: Layers under the rules that they may take; those that share nothing are left aside.
        seed: Of k-means.

    Returns:
        float16 [1, 1, k, d] by key.

    Raises:
        RecipeError: Layers that share codebooks have fewer vectors than entries.
    """
    groups: dict[SharedKey, list[LinearSpec]] = {}
    for rule, linear in readers:
        key = shared_key(rule, linear)
        if key is not None:
            groups.setdefault(key, []).append(linear)
    return {
        key: _fit(key[0], [checkpoint.form(linear.name) for linear in linears], seed)
        for key, linears in groups.items()
    }


def share_codebooks(checkpoint: Checkpoint) -> None:
    """Lets layers with equal codebooks hold one tensor, which is then stored once."""
    known: dict[tuple[object, ...], Tensor] = {}
    for linear, form in checkpoint.forms().items():
        books = _codebooks_of(form)
        if books is None:
            continue
        key = (tuple(books.shape), books.numpy().tobytes())
        kept = known.setdefault(key, books)
        if kept is not books:
            checkpoint.set_form(linear.name, _with_codebooks(form, kept))


def count_shared_once(
    checkpoint: Checkpoint, rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of the report with codebooks that layers share counted once.

    `stored_bytes` holds them at the first layer that reads them, so that rows add up; of
    `bits_per_weight` every reader bears an equal part.

    Args:
        checkpoint: The model, after `share_codebooks`.
        rows: Rows of its layers in their order.
    """
    books = {linear.name: _codebooks_of(form) for linear, form in checkpoint.forms().items()}
    readers: dict[int, int] = {}
    for found in books.values():
        if found is not None:
            readers[id(found)] = readers.get(id(found), 0) + 1
    counted: set[int] = set()
    made = []
    for row in rows:
        found = books.get(row["name"])
        count = 0 if found is None else readers[id(found)]
        if found is None or count == 1:
            made.append(dict(row))
            continue
        size = found.numel() * found.element_size()
        form = checkpoint.form(row["name"])
        own = form.stored_bytes - size
        made.append(
            {
                **row,
                "stored_bytes": own if id(found) in counted else form.stored_bytes,
                "bits_per_weight": 8 * (own + size / count) / (form.shape[0] * form.shape[1]),
            }
        )
        counted.add(id(found))
    return made


def _codebooks_of(form: WeightForm) -> Tensor | None:
    if isinstance(form, CodebookWeight):
        return form.main.codebooks
    if isinstance(form, SparseWeight) and isinstance(form.values, CodebookNonzeros):
        return form.values.codebooks
    return None


def _with_codebooks(form: WeightForm, books: Tensor) -> WeightForm:
    if isinstance(form, CodebookWeight):
        return replace(form, main=replace(form.main, codebooks=books))
    if isinstance(form, SparseWeight) and isinstance(form.values, CodebookNonzeros):
        return replace(form, values=replace(form.values, codebooks=books))
    raise TypeError(f"a weight of kind {form.kind!r} has no codebooks")


def _fit(rule: CodebookRule, forms: Sequence[WeightForm], seed: int) -> Tensor:
    """Codebooks of several layers, from normalised vectors weighted by their layers' scales."""
    vectors, weights = [], []
    generator = torch.Generator().manual_seed(seed)
    length = rule.vector_length
    most = max(1, _SAMPLE // len(forms))
    for form in forms:
        dense, keeps = form.dequantize(), keeps_of(form)
        scales = row_scales_of(dense, keeps).to(torch.float32)
        columns = dense.shape[1]
        normal = (dense / scales[:, None]).view(-1, length, columns)
        if keeps is None:
            chosen = sample_rows(normal.shape[0] * columns, most, generator)
        else:
            # A vector under a mask has one element.
            places = keeps.flatten().nonzero()[:, 0]
            chosen = places[sample_rows(places.shape[0], most, generator)]
        row, column = chosen // columns, chosen % columns
        energy = scales.square().view(-1, length).mean(1)
        vectors.append(normal[row, :, column])
        # Each layer weighs the same as a whole: a loud one is no more important than a quiet one.
        weights.append(energy[row] / energy[row].mean())
    try:
        made = cluster(
            torch.cat(vectors), torch.cat(weights), 1 << (rule.index_bits or 0), seed=seed
        )
    except ValueError as error:
        raise RecipeError(f"codebooks shared by {len(forms)} layers: {error}") from error
    return made[None, None]
