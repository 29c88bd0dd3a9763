"""Folding: the arithmetic of `pocketvlm.models.folds`, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pocketvlm.errors import CheckpointError
from pocketvlm.models.folds import (
    AddOne,
    FlattenKernel,
    Fold,
    Multiply,
    PairsToHalves,
    PatchKernel,
    Reshape,
    ResizeTable,
    ScaleRows,
    SplitRows,
    SumFrames,
    fold_sources,
    fold_targets,
)

__all__ = ["apply_fold", "folded_tensors"]


def apply_fold(fold: Fold, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a fold makes of the tensors of `fold_sources`, in the order of `fold_targets`.

    Products and sums are taken in float32 and stay so: rounded to the stored type they would no
    longer be what stock transformers computes. Moved values keep their type.

    Raises:
        CheckpointError: A tensor has a shape that the fold cannot take.
    """
    first = sources[0]
    try:
        if isinstance(fold, SplitRows):
            return tuple(part.clone() for part in first.split(fold.sizes))
        if isinstance(fold, ScaleRows):
            scale = sources[1].to(torch.float32)
            return (first.to(torch.float32) * (scale if first.dim() == 1 else scale[:, None]),)
        if isinstance(fold, AddOne):
            return (first.to(torch.float32) + 1.0,)
        if isinstance(fold, Multiply):
            return (first.to(torch.float32) * fold.factor,)
        if isinstance(fold, SumFrames):
            return (first.to(torch.float32).sum(dim=2),)
        if isinstance(fold, PatchKernel):
            shape = (first.shape[0], fold.size, fold.size, fold.channels)
            return (first.view(shape).permute(0, 3, 1, 2).contiguous(),)
        if isinstance(fold, FlattenKernel):
            return (first.permute(0, 2, 3, 1).flatten(1),)
        if isinstance(fold, PairsToHalves):
            heads = first.unflatten(0, (-1, fold.width // 2, 2))
            return (heads.transpose(1, 2).reshape(first.shape),)
        if isinstance(fold, Reshape):
            return (first.reshape(fold.shape),)
        if isinstance(fold, ResizeTable):
            return (_resize_table(first.to(torch.float32), fold.rows, fold.columns),)
        return (first.t().contiguous(),)
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"tensor {fold_sources(fold)[0]} is {tuple(first.shape)}, which cannot be folded: "
            f"{' '.join(str(error).split())}"
        ) from error


def _resize_table(table: Tensor, rows: int, columns: int) -> Tensor:
    """[side * side, hidden] to [rows * columns, hidden]."""
    side = math.isqrt(table.shape[0])
    if side * side != table.shape[0]:
        raise RuntimeError("its rows do not form a square")
    down, across = _axis_weights(side, rows), _axis_weights(side, columns)
    weights = (down[:, None, :, None] * across[None, :, None, :]).reshape(rows * columns, -1)
    return weights @ table


def _axis_weights(side: int, length: int) -> Tensor:
    """What each of `length` places takes of each of `side` places of the table."""
    scale = side / torch.tensor(float(length))
    centers = (torch.arange(length, dtype=torch.float32) + 0.5) * scale - 0.5
    distance = (torch.arange(side, dtype=torch.float32) - centers[:, None]).abs()
    weights = (1 - distance / scale.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(dim=-1, keepdim=True)


def folded_tensors(
    folds: Sequence[Fold], take: Callable[[str], Tensor]
) -> Callable[[str], Tensor | None]:
    """Tensors that folds make, by name, made when they are asked for.

    Args:
        folds: The folds of a family.
        take: Reads a stored tensor.

    Returns:
        From a tensor's name to its value; `None` for one that no fold makes.
    """
    by_target = {target: fold for fold in folds for target in fold_targets(fold)}
    waiting: dict[str, Tensor] = {}

    def make(name: str) -> Tensor | None:
        fold = by_target.get(name)
        if fold is None:
            return None
        if name not in waiting:
            made = apply_fold(fold, [take(source) for source in fold_sources(fold)])
            waiting.update(zip(fold_targets(fold), made, strict=True))
        return waiting.pop(name)

    return make
