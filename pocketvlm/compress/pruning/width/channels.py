"""Units that are removed whole: a KV group or an FFN channel, with every row and column it owns.

A unit is made by rows of some linears and read by columns of one: a channel of the FFN by a row of
`gate` and of `up` and a column of `down`; a KV group by the rows of one key head, one value head
and all query heads that read them, and by their columns of `o`. What is left is plain dense weights
in a stock class of smaller shape.

CLIP and SigLIP derive the width of a head from `hidden_size / num_attention_heads`, so a tower with
fewer heads would have wider ones: heads of a tower cannot be removed in a stock class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.checkpoint.tensors import keep_in_file
from pocketvlm.errors import RecipeError
from pocketvlm.models.layers import Part
from pocketvlm.models.spec import ModelSpec
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.modules import FormEmbedding, FormLinear

__all__ = [
    "DecoderBiases",
    "UnitGroup",
    "Widths",
    "check_dense",
    "kept_units",
    "narrow_config",
    "narrow_spec",
    "remove_units",
    "unit_groups",
]


@dataclass(frozen=True, kw_only=True)
class Widths:
    """How many units every block has; one number a tower and decoder, as stock classes want it.

    Attributes:
        ffn: Channels of the decoder's FFN.
        kv_groups: Key-value heads of the decoder, each with its query heads.
        tower_ffn: Channels of the tower's FFN.
    """

    ffn: int
    kv_groups: int
    tower_ffn: int

    @classmethod
    def of(cls, spec: ModelSpec) -> Widths:
        """The widths that a model has."""
        return cls(
            ffn=spec.decoder.ffn_size,
            kv_groups=spec.decoder.kv_heads,
            tower_ffn=spec.tower.ffn_size,
        )


@dataclass(frozen=True, kw_only=True)
class DecoderBiases:
    """Which linears of the decoder have biases: all of a sublayer or none, in stock classes."""

    attention: bool
    mlp: bool

    @classmethod
    def of(cls, spec: ModelSpec) -> DecoderBiases:
        """Those that a model has."""
        return cls(attention=spec.decoder.has_output_bias, mlp=spec.decoder.has_mlp_bias)


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitGroup:
    """The units of one sublayer.

    Attributes:
        name: Module name of the half's body.
        part: `tower` or `decoder`.
        kind: What a unit is.
        block: Index of the block.
        count: How many units there are.
        rows: Consecutive rows that a unit owns in each linear that makes it, by name.
        last: Name of the linear that reads the units.
        columns: Consecutive columns that a unit owns there.
    """

    name: str
    part: Part
    kind: Literal["kv_groups", "ffn"]
    block: int
    count: int
    rows: Mapping[str, int]
    last: str
    columns: int

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear that loses something, in order of execution."""
        return (*self.rows, self.last)

    def rows_of(self, name: str, units: Tensor) -> Tensor:
        """Rows that units own in one of the linears that make them, int64."""
        return _spread(units, self.rows[name])

    def columns_of(self, units: Tensor) -> Tensor:
        """Columns that units own in the linear that reads them, int64."""
        return _spread(units, self.columns)


def unit_groups(spec: ModelSpec, kind: Literal["kv_groups", "ffn", "tower_ffn"]) -> list[UnitGroup]:
    """The units of one kind in every block, those that no phone runs included.

    Args:
        spec: The model.
        kind: A field of `Widths`.
    """
    if kind == "tower_ffn":
        return [_tower_ffn(spec, block) for block in range(spec.tower.depth)]
    build = _kv_groups if kind == "kv_groups" else _decoder_ffn
    return [build(spec, block) for block in range(spec.decoder.depth)]


def check_dense(checkpoint: Checkpoint, method: str) -> None:
    """Checks that weights can be cut.

    Raises:
        RecipeError: A weight is sparse or quantized, or the KV cache has its own grid.
    """
    for linear, form in checkpoint.forms().items():
        if not isinstance(form, DenseWeight):
            raise RecipeError(
                f"{method}: {linear.name} has a weight of kind {form.kind!r}; allowed are dense "
                f"floats, so {method} comes before every mask and every quantizer"
            )
    if checkpoint.cache_grid is not None:
        raise RecipeError(
            f"{method}: the KV cache has scales of every head already; {method} comes before "
            "quantize_cache"
        )


def narrow_spec(spec: ModelSpec, widths: Widths, biases: DecoderBiases) -> ModelSpec:
    """The specification of a model with fewer units a block.

    Raises:
        RecipeError: The stock decoder has no place for that many heads.
    """
    decoder = spec.decoder
    heads = widths.kv_groups * (decoder.heads // decoder.kv_heads)
    if decoder.hidden_size % heads:
        possible = [
            count
            for count in range(1, decoder.kv_heads + 1)
            if decoder.hidden_size % (count * (decoder.heads // decoder.kv_heads)) == 0
        ]
        raise RecipeError(
            f"kv_groups: {widths.kv_groups} groups are {heads} query heads, which do not divide "
            f"the hidden size {decoder.hidden_size}, and the stock class refuses that; allowed are "
            f"{', '.join(map(str, possible))}"
        )
    return replace(
        spec,
        tower=replace(spec.tower, ffn_size=widths.tower_ffn),
        decoder=replace(
            decoder,
            ffn_size=widths.ffn,
            heads=heads,
            kv_heads=widths.kv_groups,
            has_qkv_bias=biases.attention or decoder.has_qkv_bias,
            has_output_bias=biases.attention,
            has_mlp_bias=biases.mlp,
        ),
    )


def narrow_config(
    config: Mapping[str, Any], spec: ModelSpec, widths: Widths, biases: DecoderBiases
) -> dict[str, Any]:
    """The content of config.json for a model with fewer units a block.

    The width of a head is said explicitly: it no longer follows from the number of heads.
    """
    narrow = narrow_spec(spec, widths, biases).decoder
    text = {
        **config["text_config"],
        "intermediate_size": narrow.ffn_size,
        "num_attention_heads": narrow.heads,
        "num_key_value_heads": narrow.kv_heads,
        "head_dim": narrow.head_dim,
        "attention_bias": narrow.has_output_bias,
        "mlp_bias": narrow.has_mlp_bias,
    }
    vision = dict(config["vision_config"])
    if widths.tower_ffn != spec.tower.ffn_size:  # some classes state it otherwise
        vision["intermediate_size"] = widths.tower_ffn
    return {**config, "text_config": text, "vision_config": vision}


def remove_units(
    checkpoint: Checkpoint, kept: Mapping[UnitGroup, Tensor], folder: Path | None = None
) -> Checkpoint:
    """Cuts every unit that is not kept out of its linears.

    Biases that the stock class lacks, such as one that a compensation put after `down`, stay: the
    other linears of the sublayer get zeros, as the class has biases everywhere or nowhere.

    Args:
        checkpoint: The model; its weights are dense.
        kept: Units that stay, ascending, of every block of every kind that is cut; equally many
            in each block.
        folder: Where the new weights lie, in files without names; `None` for memory.

    Raises:
        ValueError: Blocks of one kind would differ in width.
        RecipeError: The stock decoder has no place for that many heads.
    """
    forms = _all_forms(checkpoint)
    vectors = checkpoint.vectors()
    spec = checkpoint.spec
    biases = DecoderBiases(
        attention=any(f"{x.last}.bias" in vectors for x in unit_groups(spec, "kv_groups")),
        mlp=any(f"{x.last}.bias" in vectors for x in unit_groups(spec, "ffn")),
    )
    widths = _common_widths(spec, kept)
    config = narrow_config(checkpoint.config, spec, widths, biases)
    for group, units in kept.items():
        for name in group.rows:
            places = group.rows_of(name, units)
            forms[name] = _take(forms[name], folder, rows=places)
            if f"{name}.bias" in vectors:
                vectors[f"{name}.bias"] = vectors[f"{name}.bias"][places].clone()
        columns = group.columns_of(units)
        forms[group.last] = _take(forms[group.last], folder, columns=columns)
    for linear in narrow_spec(spec, widths, biases).linears():
        if linear.part == "decoder" and linear.has_bias:
            vectors.setdefault(f"{linear.name}.bias", torch.zeros(linear.out_features))
    return checkpoint.rebuild(config, forms, vectors)


def _kv_groups(spec: ModelSpec, block: int) -> UnitGroup:
    decoder = spec.decoder
    attention = decoder.attention(block)
    # repeat_kv lets consecutive query heads read one key-value head.
    queries = decoder.heads // decoder.kv_heads * decoder.head_dim
    return UnitGroup(
        name=attention.module,
        part="decoder",
        kind="kv_groups",
        block=block,
        count=decoder.kv_heads,
        rows={
            attention.q: queries,
            attention.k: decoder.head_dim,
            attention.v: decoder.head_dim,
        },
        last=attention.o,
        columns=queries,
    )


def _decoder_ffn(spec: ModelSpec, block: int) -> UnitGroup:
    ffn = spec.decoder.blocks[block].ffn
    return UnitGroup(
        name=ffn.module,
        part="decoder",
        kind="ffn",
        block=block,
        count=spec.decoder.ffn_size,
        rows=dict.fromkeys(ffn.inputs, 1),
        last=ffn.down,
        columns=1,
    )


def _tower_ffn(spec: ModelSpec, block: int) -> UnitGroup:
    ffn = spec.tower.blocks[block].ffn
    return UnitGroup(
        name=ffn.module,
        part="tower",
        kind="ffn",
        block=block,
        count=spec.tower.ffn_size,
        rows=dict.fromkeys(ffn.inputs, 1),
        last=ffn.down,
        columns=1,
    )


def _spread(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width)).flatten()


def _common_widths(spec: ModelSpec, kept: Mapping[UnitGroup, Tensor]) -> Widths:
    widths = Widths.of(spec)
    for field, part, kind in (
        ("ffn", "decoder", "ffn"),
        ("kv_groups", "decoder", "kv_groups"),
        ("tower_ffn", "tower", "ffn"),
    ):
        mine = [group for group in kept if (group.part, group.kind) == (part, kind)]
        counts = sorted({len(kept[group]) for group in mine})
        if not mine:
            continue
        depth = spec.tower.depth if part == "tower" else spec.decoder.depth
        if len(counts) > 1 or len(mine) != depth:
            raise ValueError(
                f"{field}: widths {counts} in {len(mine)} of {depth} blocks; a stock class has "
                "the same in all"
            )
        widths = replace(widths, **{field: counts[0]})
    return widths


def _all_forms(checkpoint: Checkpoint) -> dict[str, WeightForm]:
    """Weights of all linears and of the table, those of blocks that are never run included."""
    return {
        name: module.form
        for name, module in checkpoint.model.named_modules()
        if isinstance(module, FormLinear | FormEmbedding)
    }


def _take(
    form: WeightForm,
    folder: Path | None,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> WeightForm:
    if not isinstance(form, DenseWeight):
        raise TypeError(f"a weight of kind {form.kind!r} cannot be cut")
    values = form.values if rows is None else form.values[rows]
    taken = values if columns is None else values[:, columns].contiguous()
    return DenseWeight(values=keep_in_file(taken, folder))


def kept_units(scores: Sequence[float] | Tensor, count: int) -> Tensor:
    """Indices of the highest scores, ascending; of equal ones the first is kept, int64 [count]."""
    values = torch.as_tensor(scores, dtype=torch.float64)
    return torch.argsort(values, descending=True, stable=True)[:count].sort().values
