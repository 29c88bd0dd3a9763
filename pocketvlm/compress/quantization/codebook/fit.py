"""One layer into codebooks: k-means on its vectors, error feedback, refinement, and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pocketvlm.compress.layerwise.error_feedback import Factor, Rounding, quantize_with_feedback
from pocketvlm.compress.layerwise.hessian import InputHessian
from pocketvlm.compress.quantization.codebook.normalization import (
    NormalizedWeight,
    normalize,
    rescale,
)
from pocketvlm.compress.quantization.codebook.refinement import (
    Metric,
    best_row_scales,
    output_loss,
    refine_tables,
)
from pocketvlm.compress.quantization.codebook.rounding import (
    CodebookRounding,
    Table,
    decode_tables,
    row_pieces,
)
from pocketvlm.compress.quantization.codebook.rules import CodebookRule
from pocketvlm.compress.quantization.codebook.table_layout import TableLayout, cluster_groups
from pocketvlm.weights.codebook import CodebookWeight

__all__ = ["fit_codebooks", "round_to_codebooks"]


def fit_codebooks(
    rule: CodebookRule,
    targets: Tensor,
    hessian: InputHessian,
    *,
    shared: Tensor | None = None,
    seed: int = 0,
    rounds: int = 3,
    error_feedback: bool = True,
    rows_alike: bool = False,
    keeps: Tensor | None = None,
) -> CodebookWeight:
    """Quantizes a weight against the Hessian of its input.

    Args:
        rule: What is wanted.
        targets: [rows, columns].
        hessian: Of the layer's input; its factors are those of the whole width.
        shared: float16 [1, 1, k, d] codebooks that are taken as they are.
        seed: Of k-means.
        rounds: Times that codes are chosen; tables are refined after each. The best is kept.
        error_feedback: Whether columns make up for each other; without it, a vector takes its
            nearest entry and tables stay those of k-means.
        rows_alike: Whether every row counts the same, whatever its scale: right for a table of
            tokens, whose small rows are as good as large ones once a norm has seen them.
        keeps: Which elements a mask keeps, bool [rows, columns]: tables are made for them alone,
            and they make up for what is dropped. The others' indices stand for nothing. `None`
            keeps all.

    Raises:
        ValueError: The weight is too large for float16, or a table has fewer vectors than entries.
    """
    original = targets.T.to(torch.float32).contiguous()
    normal = normalize(original, rule, rows_alike=rows_alike, keeps=keeps)
    stretch, slices = normal.stretch, hessian.slices
    parts = list(zip(slices, hessian.hessians, hessian.factors(targets.shape[1]), strict=True))
    metric = Metric(
        slices=slices,
        hessians=tuple(
            block.to(torch.float32) * stretch[part, None] * stretch[part]
            for part, block, _ in parts
        ),
    )
    factors = [
        replace(factor, upper=factor.upper / stretch[part][factor.order.columns].to(torch.float64))
        if normal.column_scales is not None
        else factor
        for part, _, factor in parts
    ]
    diagonal = metric.diagonal
    layout = TableLayout.of(rule, targets.shape, diagonal)
    tables = layout.make(normal, diagonal, seed, shared)
    if not error_feedback:
        tables, codes = _add_residual(layout, tables, normal, normal.values, diagonal, seed)
        return layout.assemble(tables, codes, normal, shared)
    best: tuple[float, tuple[Table, ...], Tensor, Tensor | None] | None = None
    if rule.residual_bits is not None:
        seen = torch.empty_like(normal.values)
        _feed_back(tables, factors, slices, normal, seen)
        tables, _ = _add_residual(layout, tables, normal, seen, diagonal, seed)
    for _ in range(rounds):
        codes = _feed_back(tables, factors, slices, normal)
        if shared is None:
            tables = refine_tables(
                tables, codes, normal.values, metric, normal.importance, keeps=normal.keeps
            )
        if normal.row_scales is not None:
            found = [
                best_row_scales(decoded, original[:, rows], metric)
                for rows, decoded in _decode_pieces(tables, codes, normal)
            ]
            normal = rescale(normal, original, torch.cat(found))
        loss = sum(
            output_loss(decoded - normal.values[:, rows], metric, normal.importance[rows])
            for rows, decoded in _decode_pieces(tables, codes, normal)
        )
        if best is None or loss < best[0]:
            best = (loss, tables, codes, normal.row_scales)
    if best is None:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    _, tables, codes, scales = best
    return layout.assemble(tables, codes, replace(normal, row_scales=scales), shared)


def round_to_codebooks(
    rule: CodebookRule,
    weight: Tensor,
    *,
    shared: Tensor | None = None,
    seed: int = 0,
    rows_alike: bool = False,
    keeps: Tensor | None = None,
) -> CodebookWeight:
    """The form that needs no calibration: k-means with all columns alike, nearest entries.

    Args:
        rule: What is wanted.
        weight: [rows, columns].
        shared: float16 [1, 1, k, d] codebooks that are taken as they are.
        seed: Of k-means.
        rows_alike: Whether every row counts the same, whatever its scale.
        keeps: Which elements a mask keeps, as in `fit_codebooks`.

    Raises:
        ValueError: The weight is too large for float16, or a table has fewer vectors than entries.
    """
    values = weight.T.to(torch.float32).contiguous()
    normal = normalize(values, rule, rows_alike=rows_alike, keeps=keeps)
    diagonal = normal.stretch.square()
    layout = TableLayout.of(rule, (weight.shape[0], weight.shape[1]), diagonal)
    tables = layout.make(normal, diagonal, seed, shared)
    tables, codes = _add_residual(layout, tables, normal, normal.values, diagonal, seed)
    return layout.assemble(tables, codes, normal, shared)


def _decode_pieces(
    tables: Sequence[Table], codes: Tensor, normal: NormalizedWeight
) -> Iterator[tuple[slice, Tensor]]:
    """Some rows after others, with what their codes stand for, [columns, rows]."""
    for rows, cut in row_pieces(tables, *normal.values.shape):
        keeps = None if normal.keeps is None else normal.keeps[:, rows]
        yield rows, decode_tables(tables, codes[:, cut], rows.stop - rows.start, keeps)


def _add_residual(
    layout: TableLayout,
    tables: Sequence[Table],
    normal: NormalizedWeight,
    seen: Tensor,
    diagonal: Tensor,
    seed: int,
) -> tuple[tuple[Table, ...], Tensor]:
    """Second codebooks, fitted to what the first leave of `seen`; and nearest codes of that."""
    codes = _round_nearest(tables, seen, normal)
    bits = layout.rule.residual_bits
    if bits is None:
        return tuple(tables), codes
    rest = seen - decode_tables(tables, codes, layout.rows)
    added = tuple(
        table
        if table.first.shape[2] != layout.rule.vector_length or (layout.outliers and not number)
        else replace(
            table,
            second=cluster_groups(
                normal,
                rest,
                diagonal,
                table.columns,
                layout.row_groups,
                bits,
                layout.rule.vector_length,
                seed,
            ),
        )
        for number, table in enumerate(tables)
    )
    return added, _round_nearest(added, seen, normal)


def _round_nearest(tables: Sequence[Table], values: Tensor, normal: NormalizedWeight) -> Tensor:
    """Nearest codes of [columns, rows], without feedback."""
    columns = torch.arange(values.shape[0])
    rounding = CodebookRounding(tables, columns, normal.importance)
    first = rounding.round(values[0])[0]
    codes = torch.empty(values.shape[0], first.shape[0], dtype=torch.int32)
    codes[0] = first
    for place, column in enumerate(values[1:], start=1):
        codes[place] = rounding.round(column)[0]
    return codes


def _feed_back(
    tables: Sequence[Table],
    factors: Sequence[Factor],
    slices: Sequence[slice],
    normal: NormalizedWeight,
    seen: Tensor | None = None,
) -> Tensor:
    """Codes with error feedback, [columns, codes]; the targets that were rounded go to `seen`."""
    codes: Tensor | None = None
    for factor, part in zip(factors, slices, strict=True):
        own = part.start + factor.order.columns
        for rows, cut in row_pieces(tables, *normal.values.shape):
            values = normal.values[part, rows]
            kept = None if normal.keeps is None else normal.keeps[part, rows].T
            rounding: Rounding = CodebookRounding(tables, own, normal.importance[rows])
            if seen is not None:
                rounding = _Recorder(rounding, values.shape)
            targets = values.T.to(torch.float64)
            found = quantize_with_feedback(targets, factor, rounding, kept)
            if codes is None:
                count = found.shape[1] * normal.values.shape[1] // values.shape[1]
                codes = torch.empty(normal.values.shape[0], count, dtype=torch.int32)
            codes[part, cut] = found.to(torch.int32)
            if seen is not None and isinstance(rounding, _Recorder):
                seen[own, rows] = rounding.seen
    if codes is None:
        raise ValueError("a weight has no columns")
    return codes


class _Recorder:
    """A rounding that remembers what it was asked to round."""

    def __init__(self, rounding: Rounding, shape: Sequence[int]) -> None:
        self._rounding = rounding
        self._next = 0
        self.seen = torch.empty(*shape)

    def enter_group(self, group: int, weights: Tensor, keeps: Tensor | None = None) -> None:
        self._rounding.enter_group(group, weights, keeps)

    def round(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        self.seen[self._next] = weights
        self._next += 1
        return self._rounding.round(weights)
