"""One layer into codebooks: k-means on its vectors, error feedback, refinement, and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pocketvlm.compress.layerwise.error_feedback import Factor, Rounding, quantize_with_feedback
from pocketvlm.compress.layerwise.row_chunks import row_chunks
from pocketvlm.compress.quantization.codebook.kmeans import cluster
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
from pocketvlm.compress.quantization.layer_quantizer import Weighed
from pocketvlm.compress.quantization.layer_report import behind_mask
from pocketvlm.weights.codebook import CodebookWeight, Lookup
from pocketvlm.weights.float_weights import keeps_of
from pocketvlm.weights.form import WeightForm

__all__ = ["CodebookFitter", "fit_codebooks", "round_to_codebooks", "row_scales_of"]

_LEAST_SCALE = 2.0**-14
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, kw_only=True, eq=False)
class _Normal:
    """A weight and what was divided out of it.

    Attributes:
        values: float32 [columns, rows].
        row_scales: float16 [rows], or `None`.
        column_scales: float16 [columns], or `None`.
        column_offsets: float16 [columns], or `None`.
        rows_alike: Whether errors count in proportion to their row's scale.
        keeps: Which elements a mask keeps, bool [columns, rows]; `None` for all.
    """

    values: Tensor
    row_scales: Tensor | None = None
    column_scales: Tensor | None = None
    column_offsets: Tensor | None = None
    rows_alike: bool = False
    keeps: Tensor | None = None

    @property
    def importance(self) -> Tensor:
        """How much an error in each row counts, [rows]."""
        if self.row_scales is None or self.rows_alike:
            return torch.ones(self.values.shape[1])
        return self.row_scales.to(torch.float32).square()

    @property
    def stretch(self) -> Tensor:
        """How much an error in each column counts, beside its input, [columns]."""
        if self.column_scales is None:
            return torch.ones(self.values.shape[0])
        return self.column_scales.to(torch.float32)


def row_scales_of(weights: Tensor, keeps: Tensor | None = None) -> Tensor:
    """Root mean square of every row of [rows, columns], float16; one for rows of zeros.

    The mean is over those elements that a mask keeps, bool [rows, columns], where there is one.
    """
    found = []
    step = max(1, _CHUNK_ELEMENTS // weights.shape[1])
    for start in range(0, weights.shape[0], step):
        squares = weights[start : start + step].to(torch.float64).square_()
        if keeps is None:
            found.append(squares.mean(1))
            continue
        kept = keeps[start : start + step]
        found.append(squares.masked_fill_(~kept, 0.0).sum(1) / kept.sum(1).clamp_min(1))
    return _as_scales(torch.cat(found).sqrt())


def fit_codebooks(
    rule: CodebookRule,
    targets: Tensor,
    weighed: Weighed,
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
        weighed: What is known of the layer's input.
        shared: float16 [1, 1, k, d] codebooks that are taken as they are.
        seed: Of k-means.
        rounds: Times that codes are chosen; tables are refined behind each. The best is kept.
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
    normal = _normalize(original, rule, rows_alike=rows_alike, keeps=keeps)
    evidence = weighed.evidence
    stretch = normal.stretch
    parts = list(zip(evidence.slices, evidence.hessians, weighed.factors, strict=True))
    metric = Metric(
        slices=evidence.slices,
        hessians=tuple(
            hessian.to(torch.float32) * stretch[part, None] * stretch[part]
            for part, hessian, _ in parts
        ),
    )
    factors = [
        replace(factor, upper=factor.upper / stretch[part][factor.order.columns].to(torch.float64))
        if normal.column_scales is not None
        else factor
        for part, _, factor in parts
    ]
    diagonal = metric.diagonal
    layout = _Layout.of(rule, targets.shape, diagonal)
    tables = layout.make(normal, diagonal, seed, shared)
    if not error_feedback:
        tables, codes = _add_residual(layout, tables, normal, normal.values, diagonal, seed)
        return layout.assemble(tables, codes, normal, shared)
    best: tuple[float, tuple[Table, ...], Tensor, Tensor | None] | None = None
    if rule.residual_bits is not None:
        seen = torch.empty_like(normal.values)
        _feed_back(tables, factors, evidence.slices, normal, seen)
        tables, _ = _add_residual(layout, tables, normal, seen, diagonal, seed)
    for _ in range(rounds):
        codes = _feed_back(tables, factors, evidence.slices, normal)
        if shared is None:
            tables = refine_tables(
                tables, codes, normal.values, metric, normal.importance, keeps=normal.keeps
            )
        if normal.row_scales is not None:
            found = [
                best_row_scales(decoded, original[:, rows], metric)
                for rows, decoded in _decode_pieces(tables, codes, normal)
            ]
            normal = _rescale(normal, original, torch.cat(found))
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
    normal = _normalize(values, rule, rows_alike=rows_alike, keeps=keeps)
    diagonal = normal.stretch.square()
    layout = _Layout.of(rule, (weight.shape[0], weight.shape[1]), diagonal)
    tables = layout.make(normal, diagonal, seed, shared)
    tables, codes = _add_residual(layout, tables, normal, normal.values, diagonal, seed)
    return layout.assemble(tables, codes, normal, shared)


@dataclass(frozen=True, kw_only=True, eq=False)
class CodebookFitter:
    """Codebooks with error feedback beside plain k-means.

    Attributes:
        shared: Codebooks of several layers, which are taken as they are; or `None`.
        seed: Of k-means.
        rounds: Times that codes are chosen.
        error_feedback: Whether columns make up for each other.
        rows_alike: Whether every row counts the same, whatever its scale.
        label: Name of the calibrated method in reports.
        plain_label: Name of the plain one.
    """

    shared: Tensor | None = None
    seed: int = 0
    rounds: int = 3
    error_feedback: bool = True
    rows_alike: bool = False
    label: str = "vptq"
    plain_label: str = "k-means"

    def fit(self, rule: CodebookRule, weight: WeightForm, weighed: Weighed) -> WeightForm:
        """Codebooks that the layer's inputs have shaped."""
        form = fit_codebooks(
            rule,
            _turned(weight, weighed.targets).T,
            weighed,
            shared=self.shared,
            seed=self.seed,
            rounds=self.rounds,
            error_feedback=self.error_feedback,
            rows_alike=self.rows_alike,
            keeps=keeps_of(weight),
        )
        return behind_mask(form, weight)

    def round(self, rule: CodebookRule, weight: WeightForm) -> WeightForm:
        """Plain k-means."""
        form = round_to_codebooks(
            rule,
            _turned(weight, lambda rows: rows).T,
            shared=self.shared,
            seed=self.seed,
            rows_alike=self.rows_alike,
            keeps=keeps_of(weight),
        )
        return behind_mask(form, weight)


def _turned(weight: WeightForm, targets: Callable[[Tensor], Tensor]) -> Tensor:
    """What rows of a weight should become, float32 [columns, rows], without a copy in between."""
    turned = torch.empty(weight.shape[1], weight.shape[0])
    for span, rows in row_chunks(weight):
        turned[:, span] = targets(rows).T
    return turned


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layout:
    """How a matrix is cut into tables.

    Attributes:
        rule: What is wanted.
        rows: Rows of the weight.
        order: Columns in stored order, or `None` for their natural one.
        outliers: Columns in front that get the finer codebook.
        columns: All columns.
    """

    rule: CodebookRule
    rows: int
    columns: int
    order: Tensor | None
    outliers: int

    @classmethod
    def of(cls, rule: CodebookRule, shape: Sequence[int], diagonal: Tensor) -> _Layout:
        rows, columns = shape
        outliers = rule.outlier_columns(columns)
        order = None
        if outliers or rule.column_groups > 1:
            order = torch.argsort(diagonal, descending=True, stable=True)
        return cls(rule=rule, rows=rows, columns=columns, order=order, outliers=outliers)

    @property
    def row_groups(self) -> int:
        return self.rows // (self.rule.rows_a_group or self.rows)

    def spans(self) -> Iterator[tuple[Tensor, int, int, int]]:
        """Columns of each table, its row groups, bits and vector length; outliers first."""
        rule = self.rule
        order = torch.arange(self.columns) if self.order is None else self.order
        if self.outliers:
            yield order[: self.outliers], 1, rule.outlier_bits, rule.outlier_length
        width = -(-(self.columns - self.outliers) // rule.column_groups)
        for columns in order[self.outliers :].split(width):
            yield columns, self.row_groups, rule.index_bits or 0, rule.vector_length

    def make(
        self, normal: _Normal, diagonal: Tensor, seed: int, shared: Tensor | None
    ) -> tuple[Table, ...]:
        """Tables by weighted k-means, without any residual."""
        if shared is not None:
            (columns, *_) = next(self.spans())
            return (Table(columns=columns, first=shared[0].to(torch.float32)),)
        return tuple(
            Table(
                columns=columns,
                first=_cluster_groups(
                    normal, normal.values, diagonal, columns, groups, bits, d, seed
                ),
            )
            for columns, groups, bits, d in self.spans()
        )

    def assemble(
        self, tables: Sequence[Table], codes: Tensor, normal: _Normal, shared: Tensor | None
    ) -> CodebookWeight:
        """What is stored."""
        rule = self.rule
        main = tables[1:] if self.outliers else tables
        vectors = self.rows // rule.vector_length

        def lookup(books: Sequence[Tensor], own: Sequence[Table], bits: int, start: int) -> Lookup:
            count = self.rows // books[0].shape[2]
            columns = torch.cat([table.columns for table in own])
            indices = codes[columns, start : start + count].T.contiguous()
            made = torch.stack(list(books), dim=1).to(torch.float16)
            return Lookup.from_indices(indices, made if shared is None else shared, index_bits=bits)

        second = [table.second for table in main if table.second is not None]
        return CodebookWeight(
            main=lookup([table.first for table in main], main, rule.index_bits or 0, 0),
            residual=lookup(second, main, rule.residual_bits or 0, vectors) if second else None,
            outliers=(
                lookup([tables[0].first], tables[:1], rule.outlier_bits, 0)
                if self.outliers
                else None
            ),
            order=None if self.order is None else self.order.to(torch.int32),
            row_scales=normal.row_scales,
            column_scales=normal.column_scales,
            column_offsets=normal.column_offsets,
        )


def _normalize(
    weights: Tensor, rule: CodebookRule, *, rows_alike: bool, keeps: Tensor | None
) -> _Normal:
    """Divides scales out of [columns, rows], for a mask [rows, columns]."""
    turned = None if keeps is None else keeps.T.contiguous()
    if rule.normalize == "rows":
        scales = row_scales_of(weights.T, keeps)
        values = weights / scales.to(torch.float32)
        return _Normal(values=values, row_scales=scales, rows_alike=rows_alike, keeps=turned)
    if rule.normalize == "columns":
        offsets = weights.mean(1).to(torch.float16)
        centred = weights - offsets.to(torch.float32)[:, None]
        scales = row_scales_of(centred)
        return _Normal(
            values=centred / scales.to(torch.float32)[:, None],
            column_scales=scales,
            column_offsets=offsets,
        )
    return _Normal(values=weights, keeps=turned)


def _decode_pieces(
    tables: Sequence[Table], codes: Tensor, normal: _Normal
) -> Iterator[tuple[slice, Tensor]]:
    """Some rows after others, with what their codes stand for, [columns, rows]."""
    for rows, cut in row_pieces(tables, *normal.values.shape):
        keeps = None if normal.keeps is None else normal.keeps[:, rows]
        yield rows, decode_tables(tables, codes[:, cut], rows.stop - rows.start, keeps)


def _rescale(normal: _Normal, original: Tensor, found: Tensor) -> _Normal:
    """The weight over row scales that suit what its rows were rounded to, where those are sane."""
    scales = normal.row_scales
    if scales is None:
        return normal
    before = scales.to(torch.float32)
    # A scale far off belongs to a row whose codes say nothing about it.
    usable = torch.isfinite(found) & (found > before / 2) & (found < before * 2)
    scales = _as_scales(torch.where(usable, found, before))
    return replace(normal, values=original / scales.to(torch.float32), row_scales=scales)


def _as_scales(values: Tensor) -> Tensor:
    scales = torch.where(values > 0, values.clamp_min(_LEAST_SCALE), 1.0).to(torch.float16)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("a weight is too large for a float16 scale")
    return scales


def _cluster_groups(
    normal: _Normal,
    values: Tensor,
    diagonal: Tensor,
    columns: Tensor,
    groups: int,
    bits: int,
    length: int,
    seed: int,
) -> Tensor:
    """One k-means a group of rows; float32 [groups, k, d]."""
    # A natural order needs no copy.
    is_whole = columns.shape[0] == values.shape[0] and bool((columns[1:] > columns[:-1]).all())
    chosen = values if is_whole else values[columns]
    vectors = chosen.view(columns.shape[0], groups, -1, length)
    heights = normal.importance.view(groups, -1, length).mean(2)
    keeps = None if normal.keeps is None else normal.keeps[columns].view(len(columns), groups, -1)
    books = []
    for group in range(groups):
        own = vectors[:, group].reshape(-1, length)
        mass = (diagonal[columns][:, None] * heights[group]).reshape(-1)
        if keeps is not None:
            # A vector behind a mask has one element.
            places = keeps[:, group].reshape(-1)
            own, mass = own[places], mass[places]
        books.append(cluster(own, mass, 1 << bits, seed=seed))
    return torch.stack(books).to(torch.float32)


def _add_residual(
    layout: _Layout,
    tables: Sequence[Table],
    normal: _Normal,
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
            second=_cluster_groups(
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


def _round_nearest(tables: Sequence[Table], values: Tensor, normal: _Normal) -> Tensor:
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
    normal: _Normal,
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
