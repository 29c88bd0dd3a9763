"""The VPTQ layout of one layer, as the `vptq` package defines it (VPTQ: arXiv 2409.17066).

For a matrix [O, I] whose I = outliers + groups * size columns stand in the order of `perm`:

- `centroids.weight` [groups, k * v] and `res_centroids.weight` [groups, kr * v]: one codebook a
  group of columns, entry by entry.
- `indices` int32 [groups, O / v, ceil(size * bits / 32)]: a bit stream along the group's columns,
  lowest bits first; of each code of log2(k) + log2(kr) bits the low ones are the main index.
- `outlier_centroids.weight` [1, k0 * v0] and `outlier_indices` int16 [1, O / v0, outliers], each
  the bits of a uint16: the first columns.
- `perm` int16 [I], the bits of a uint16: which column stands at each place.
- `weight_scale` and `weight_bias` [I]: factor and offset of each column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketvlm.errors import CheckpointError, UnsupportedError
from pocketvlm.weights.codebook import CodebookWeight, Lookup
from pocketvlm.weights.formats.bit_stream import as_float16, pack_words, unpack_words

__all__ = ["VptqLayout", "from_vptq", "to_vptq", "vptq_layer_config"]

_HALF = 16
_MAX_COLUMNS = 1 << _HALF
_NONE = -1


def to_vptq(name: str, form: CodebookWeight) -> dict[str, Tensor]:
    """The tensors of a layer in the VPTQ layout, by their last names.

    Codebooks are filled up with zeros to a power of two, which is what readers count bits from; no
    index points there.

    Args:
        name: The layer, for messages.
        form: The weight, [O, I].

    Raises:
        UnsupportedError: The layout has no place for a part of the form.
    """
    _refuse(name, form)
    groups = form.main.codebooks.shape[1]
    bits = _index_bits(form.main)
    codes = form.main.indices()
    tensors = {"centroids.weight": _filled(form.main)}
    if form.residual is not None:
        codes |= form.residual.indices() << bits
        tensors["res_centroids.weight"] = _filled(form.residual)
    total = bits + (_index_bits(form.residual) if form.residual is not None else 0)
    grouped = codes.view(codes.shape[0], groups, -1).transpose(0, 1)
    tensors["indices"] = _pack_wide(grouped, total)
    if form.outliers is not None:
        tensors["outlier_centroids.weight"] = _filled(form.outliers)
        tensors["outlier_indices"] = _as_int16(form.outliers.indices())[None]
    if form.order is not None:
        tensors["perm"] = _as_int16(form.order)
    if form.column_scales is not None or form.column_offsets is not None:
        ones = torch.ones(form.shape[1], dtype=torch.float16)
        scales, offsets = form.column_scales, form.column_offsets
        tensors["weight_scale"] = ones if scales is None else scales
        tensors["weight_bias"] = torch.zeros_like(ones) if offsets is None else offsets
    return tensors


def vptq_layer_config(form: CodebookWeight, *, has_bias: bool) -> dict[str, Any]:
    """A layer's entry in `config_for_layers`; pairs say first what holds for outliers."""
    main, residual, outliers = form.main, form.residual, form.outliers
    rows, columns = form.shape
    return {
        "in_features": columns,
        "out_features": rows,
        "vector_lens": [_NONE if outliers is None else outliers.vector_length, main.vector_length],
        "num_centroids": [
            _NONE if outliers is None else 1 << _index_bits(outliers),
            1 << _index_bits(main),
        ],
        "num_res_centroids": [_NONE, _NONE if residual is None else 1 << _index_bits(residual)],
        "group_num": main.codebooks.shape[1],
        "group_size": main.group_columns,
        "outlier_size": 0 if outliers is None else outliers.columns,
        "indices_as_float": False,
        "is_indice_packed": True,
        "enable_norm": form.column_scales is not None or form.column_offsets is not None,
        "enable_perm": form.order is not None,
        "bias": has_bias,
        "vector_quant_dim": "out",
    }


def from_vptq(
    name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> CodebookWeight:
    """The form of a layer that is stored in the VPTQ layout; undoes `to_vptq`.

    Args:
        name: The layer, for messages.
        tensors: Its tensors by their last names, without the bias.
        config: Its entry in `config_for_layers`.

    Raises:
        CheckpointError: Tensors or settings are missing, unknown, or contradict each other.
        UnsupportedError: The variant has no form here.
    """
    left = dict(tensors)

    def take(key: str, shape: tuple[int, ...]) -> Tensor:
        if key not in left:
            raise CheckpointError(f"{name}.{key} is missing from the weights")
        value = left.pop(key)
        if tuple(value.shape) != shape:
            raise CheckpointError(
                f"{name}.{key} is {tuple(value.shape)}, and config_for_layers says {shape}"
            )
        return value

    def codebooks(key: str, groups: int, entries: int, length: int) -> Tensor:
        flat = as_float16(take(key, (groups, entries * length)), f"{name}.{key}")
        return flat.view(1, groups, entries, length)

    try:
        rows, columns = config["out_features"], config["in_features"]
        outlier_length, length = config["vector_lens"]
        outlier_entries, entries = config["num_centroids"]
        _, residual_entries = config["num_res_centroids"]
        groups, size = config["group_num"], config["group_size"]
        apart = config["outlier_size"] if outlier_length > 1 and outlier_entries > 0 else 0
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: config_for_layers is incomplete: {error}") from error
    if not config.get("is_indice_packed", False) or config.get("vector_quant_dim", "out") != "out":
        raise UnsupportedError(f"{name}: only packed indices of vectors along the output are read")
    _check_sizes(name, rows, columns, length, groups * size + apart)
    bits = _bits_of(name, entries)
    residual_bits = _bits_of(name, residual_entries) if residual_entries > 0 else 0
    words = -(-size * (bits + residual_bits) // 32)
    codes = _unpack_wide(
        take("indices", (groups, rows // length, words)), bits + residual_bits, size
    )
    codes = codes.transpose(0, 1).reshape(rows // length, groups * size)
    main = Lookup.from_indices(
        codes & ((1 << bits) - 1),
        codebooks("centroids.weight", groups, entries, length),
        index_bits=bits,
    )
    residual = outliers = None
    if residual_bits:
        residual = Lookup.from_indices(
            codes >> bits,
            codebooks("res_centroids.weight", groups, residual_entries, length),
            index_bits=residual_bits,
        )
    if apart:
        _check_sizes(name, rows, columns, outlier_length, columns)
        stored = take("outlier_indices", (1, rows // outlier_length, apart))
        outliers = Lookup.from_indices(
            _from_int16(stored[0]),
            codebooks("outlier_centroids.weight", 1, outlier_entries, outlier_length),
            index_bits=_bits_of(name, outlier_entries),
        )
    has_norm = config.get("enable_norm", False)
    scales, offsets = (
        as_float16(take(key, (columns,)), f"{name}.{key}") if has_norm else None
        for key in ("weight_scale", "weight_bias")
    )
    order = (
        _from_int16(take("perm", (columns,))).to(torch.int32)
        if config.get("enable_perm", False)
        else None
    )
    if left:
        raise CheckpointError(f"{name}.{min(left)} has no place in the VPTQ layout")
    return CodebookWeight(
        main=main,
        residual=residual,
        outliers=outliers,
        order=order,
        column_scales=scales,
        column_offsets=offsets,
    )


@dataclass(frozen=True, kw_only=True)
class VptqLayout:
    """How the layers of a VPTQ checkpoint are stored.

    Attributes:
        layers: Settings of a layer by its name.
        shared: Settings by a layer's last name, where it has none.
    """

    layers: Mapping[str, Mapping[str, Any]]
    shared: Mapping[str, Mapping[str, Any]]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VptqLayout:
        """Reads a `quantization_config`."""
        return cls(
            layers=config.get("config_for_layers") or {},
            shared=config.get("shared_layer_config") or {},
        )

    def holds(self, tensors: Sequence[str]) -> bool:
        """Whether a layer with these tensors is quantized."""
        return "indices" in tensors

    def read(self, name: str, tensors: Mapping[str, Tensor]) -> CodebookWeight:
        """The form of a layer; raises as `from_vptq` does."""
        config = self.layers.get(name, self.shared.get(name.rpartition(".")[2]))
        if config is None:
            raise CheckpointError(f"quantization_config: config_for_layers lacks {name}")
        return from_vptq(name, tensors, config)


def _refuse(name: str, form: CodebookWeight) -> None:
    main, residual, outliers = form.main, form.residual, form.outliers
    parts = [part for part in (main, residual, outliers) if part is not None]
    reason = None
    if form.row_scales is not None:
        reason = (
            "has one scale per row, for which the VPTQ layout has no place; quantize with "
            "normalize: none or normalize: columns"
        )
    elif any(part.codebooks.shape[0] > 1 for part in parts):
        reason = "has several groups of rows, and the VPTQ layout knows groups of columns alone"
    elif main.columns % main.codebooks.shape[1]:
        reason = (
            f"has {main.columns} columns in {main.codebooks.shape[1]} groups, and groups of the "
            "VPTQ layout are equally wide"
        )
    elif residual is not None and (
        residual.vector_length != main.vector_length
        or residual.codebooks.shape[1] != main.codebooks.shape[1]
    ):
        reason = "has a residual whose vectors or groups are not those of the main codebook"
    elif residual is not None and _index_bits(residual) > _index_bits(main):
        # unpack_index_tensor of vptq masks both indices with the width of the main one.
        reason = "has more residual than main centroids, of which readers would drop bits"
    elif outliers is not None and outliers.codebooks.shape[1] > 1:
        reason = "has several codebooks for outlier columns, and the VPTQ layout has one"
    elif outliers is not None and outliers.vector_length == 1:
        reason = "has outlier columns with vectors of one row, which readers leave out"
    elif form.order is not None and form.shape[1] > _MAX_COLUMNS:
        reason = f"has {form.shape[1]} columns, and an order of the VPTQ layout has 16 bits"
    if reason is not None:
        raise UnsupportedError(f"{name}: {reason}")


def _index_bits(lookup: Lookup) -> int:
    """Bits that readers give an index of these codebooks."""
    return max(1, math.ceil(math.log2(lookup.codebooks.shape[2])))


def _filled(lookup: Lookup) -> Tensor:
    """Codebooks [groups, 2**bits * d] in their own memory; forms may share theirs."""
    _, groups, entries, length = lookup.codebooks.shape
    filled = lookup.codebooks.new_zeros(groups, 1 << _index_bits(lookup), length)
    filled[:, :entries] = lookup.codebooks[0]
    return filled.view(groups, -1)


def _pack_wide(codes: Tensor, bits: int) -> Tensor:
    """`pack_words` for codes of up to 32 bits: each is a low and a high half of the stream."""
    if bits <= _HALF:
        return pack_words(codes, bits)
    places = torch.arange(bits)
    planes = (codes[..., None] >> places) & 1
    return pack_words(planes.reshape(*codes.shape[:-1], -1), 1)


def _unpack_wide(words: Tensor, bits: int, count: int) -> Tensor:
    if bits <= _HALF:
        return unpack_words(words, bits, count)
    planes = unpack_words(words, 1, count * bits).view(*words.shape[:-1], count, bits)
    return (planes << torch.arange(bits)).sum(dim=-1)


def _as_int16(values: Tensor) -> Tensor:
    """Integers below 2**16 as the int16 of the same bits, in which they travel."""
    wide = values.to(torch.int32)
    return torch.where(wide >= 1 << 15, wide - (1 << 16), wide).to(torch.int16)


def _from_int16(values: Tensor) -> Tensor:
    return values.to(torch.int64) & 0xFFFF


def _bits_of(name: str, entries: int) -> int:
    bits = int(entries).bit_length() - 1
    if entries != 1 << bits or not 1 <= bits <= _HALF:
        raise UnsupportedError(
            f"{name}: {entries} centroids; supported is a power of two from 2 to {1 << _HALF}"
        )
    return bits


def _check_sizes(name: str, rows: int, columns: int, length: int, covered: int) -> None:
    if length < 1 or rows % length:
        raise UnsupportedError(f"{name}: vectors of {length} rows do not divide {rows} rows")
    if covered != columns:
        raise CheckpointError(
            f"{name}: groups and outliers cover {covered} columns, and in_features is {columns}"
        )
