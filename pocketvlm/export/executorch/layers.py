"""Layers as ExecuTorch's XNNPACK partitioner recognises them, made from weight forms.

The quantized patterns are spelled in torch's own `quantized_decomposed` operators: activations get
an int8 scale and zero point per token when they arrive, weights are the checkpoint's integers. The
partitioner turns each pattern into one kernel, and what torch computes here is what that kernel
computes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.ao.quantization.fx._decomposed  # registers the quantized_decomposed operators
from torch import Tensor, nn
from torch.nn import functional

from pocketvlm.export.executorch.limits import kernel_bits
from pocketvlm.export.executorch.weights import (
    IntegerMatrix,
    integer_matrix,
    scale_rounding,
    signed_codes,
)
from pocketvlm.graph.rotary import patch_angles, patch_positions
from pocketvlm.models.tower import TowerSpec
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.modules import FormEmbedding, FormLinear

__all__ = ["DenseLinear", "DynamicLinear", "Kernels", "TableDense", "TableInteger", "pack_nibbles"]

_QUANTIZED = torch.ops.quantized_decomposed
_NARROW = 4


class DenseLinear(nn.Module):
    """A float32 linear layer."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Applies the layer to [1, tokens, in_features]."""
        return functional.linear(inputs, self.weight, self.bias)


class _Product(nn.Module):
    """Signed integers times inputs that are rounded to int8, token by token: one kernel."""

    def __init__(self, codes: Tensor, scales: Tensor, *, bits: int, group_size: int) -> None:
        super().__init__()
        # Rows with one scale have their own kernel, which takes the scales as a vector.
        self._group_size = 0 if scales.shape[1] == 1 else group_size
        scales = scales if self._group_size else scales[:, 0].contiguous()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", torch.zeros(scales.shape, dtype=torch.int8))
        self._highest = (1 << (bits - 1)) - 1

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """[1, tokens, columns] to [1, tokens, rows]."""
        scale, zero = _QUANTIZED.choose_qparams_per_token_asymmetric(inputs, torch.int8)
        grid = (scale, zero, -128, 127, torch.int8)
        rounded = _QUANTIZED.quantize_per_token(inputs, *grid)
        rounded = _QUANTIZED.dequantize_per_token(rounded, *grid, torch.float32)
        return functional.linear(rounded, self._weight(), bias)

    def _weight(self) -> Tensor:
        ends = (-self._highest - 1, self._highest, torch.int8)
        if self._group_size:
            weight: Tensor = _QUANTIZED.dequantize_per_channel_group(
                self.codes, self.scales, self.zeros, *ends, self._group_size, torch.float32
            )
        else:
            weight = _QUANTIZED.dequantize_per_channel(
                self.codes, self.scales, self.zeros, 0, *ends
            )
        return weight


class DynamicLinear(nn.Module):
    """A linear layer of integers: a product for each digit, one of group sums for offsets."""

    bias: Tensor | None
    offsets: Tensor | None
    ones: Tensor

    def __init__(self, matrix: IntegerMatrix, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("bias", bias)
        self.products = nn.ModuleList(
            _Product(
                digit,
                matrix.scales * 16**place,
                bits=matrix.bits,
                group_size=matrix.group_size,
            )
            for place, digit in enumerate(matrix.digits)
        )
        self.register_buffer("offsets", matrix.offsets)
        self._group_size = matrix.group_size
        self._padding = matrix.digits[0].shape[1] - matrix.in_features
        if matrix.offsets is not None:
            self.register_buffer("ones", torch.ones(1, matrix.group_size))

    def forward(self, inputs: Tensor) -> Tensor:
        """Applies the layer to [1, tokens, in_features]."""
        if self._padding:
            inputs = functional.pad(inputs, (0, self._padding))
        first, *others = self.products
        outputs: Tensor = first(inputs, self.bias)
        for product in others:
            outputs = outputs + product(inputs, None)
        if self.offsets is not None:
            groups = inputs.view(1, -1, self._group_size)
            sums = functional.linear(groups, self.ones).view(1, -1, self.offsets.shape[1])
            outputs = outputs + functional.linear(sums, self.offsets)
        return outputs


class TableDense(nn.Module):
    """A float32 token embedding."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Looks up [1, length] ids, returns [1, length, width]."""
        return functional.embedding(token_ids, self.weight)


class TableInteger(nn.Module):
    """A token embedding of integers of 4 or 8 bits.

    The table lies in memory byte for byte as XNNPACK stores a head of the same weight, so that a
    tied one can be stored once. Its operator reads the two codes of a byte the other way round,
    which is undone after it.
    """

    def __init__(self, form: AffineWeight) -> None:
        super().__init__()
        _register_lookups()
        self._bits = kernel_bits(form.bits)
        signed, zeros = signed_codes(form)
        signed = signed[:, : form.in_features + form.in_features % 2]
        self._width = form.in_features
        self.register_buffer("codes", pack_nibbles(signed) if self._bits == _NARROW else signed)
        self.register_buffer("scales", form.scales.to(torch.float32))
        self.register_buffer("zeros", None if zeros is None else zeros.to(torch.float32))

    def forward(self, token_ids: Tensor) -> Tensor:
        """Looks up [1, length] ids, returns [1, length, width]."""
        half = 1 << (self._bits - 1)
        stored = (self.codes, self.scales, self.zeros, -half, half - 1, token_ids)
        if self._bits != _NARROW:
            rows: Tensor = _QUANTIZED.embedding_byte(*stored)
            return rows
        rows = _QUANTIZED.embedding_4bit(*stored)
        return rows.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def _register_lookups() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules that warn about each other's versions
        # Registers embedding_byte and embedding_4bit.
        import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two signed 4-bit integers a byte, each 8 larger, the first in the lower half.

    Args:
        codes: int8 [rows, columns] from -8 to 7; columns are even.

    Returns:
        uint8 [rows, columns / 2].
    """
    raised = (codes + 8).to(torch.uint8)
    return raised[:, 0::2] | (raised[:, 1::2] << _NARROW)


class Kernels(nn.Module):
    """The layers that a method uses, made from those of a model when they are first called.

    Attributes:
        roundings: How far a kernel's scales are from the form's, largest relative change, by
            layer; only those that change.
        dense: Layers of a compressed form that no kernel reads, so that they are stored dense.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._layers = nn.ModuleDict()
        # Not registered: what a method does not use must not travel with it.
        self._model = (model,)
        self.roundings: dict[str, float] = {}
        self.dense: list[str] = []

    def module(self, name: str) -> nn.Module:
        """A module of the model."""
        return self._model[0].get_submodule(name)

    def linear(self, inputs: Tensor, name: str) -> Tensor:
        """A linear layer."""
        return self._run(name, inputs, self._make_linear)

    def embed(self, token_ids: Tensor, name: str) -> Tensor:
        """Rows of a token embedding."""
        return self._run(name, token_ids, self._make_table)

    def positions(self, name: str, tower: TowerSpec) -> Tensor:
        """Learned positions of a tower's tokens, [tokens, hidden]: a constant of the program."""
        table = cast("Tensor", self.module(name).weight)
        if tower.table_side is None:
            return table
        key = f"{name}/resampled".replace(".", "/")
        if key not in self._layers:
            with torch.no_grad():
                self._layers[key] = _Constant(patch_positions(tower, table))
        return cast("_Constant", self._layers[key]).values

    def patch_angles(self, tower: TowerSpec) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a tower's patches, each [1, patches, 1, head_dim]: constants."""
        keys = ("patches/cosine", "patches/sine")
        if keys[0] not in self._layers:
            for key, values in zip(keys, patch_angles(tower), strict=True):
                self._layers[key] = _Constant(values[:, :, None])
        cosine, sine = (cast("_Constant", self._layers[key]).values for key in keys)
        return cosine, sine

    def mean(self, inputs: Tensor) -> Tensor:
        """The mean of every row, [..., 1]: a product, since no kernel averages rows."""
        width = inputs.shape[-1]
        return self._run(f"mean_{width}", inputs, lambda _: _averager(width))

    def rotate_half(self, heads: Tensor) -> Tensor:
        """(x, y) to (-y, x) in every head: a product, since only fixed sizes can be cut."""
        width = heads.shape[-1]
        return self._run(f"rotate_{width}", heads, lambda _: _half_turn(width))

    def layers(self) -> Mapping[str, nn.Module]:
        """What was made, by the name of the layer."""
        return {key.replace("/", "."): layer for key, layer in self._layers.items()}

    def _run(self, name: str, inputs: Tensor, make: Callable[[str], nn.Module]) -> Tensor:
        key = name.replace(".", "/")
        if key not in self._layers:
            self._layers[key] = make(name)
        outputs: Tensor = self._layers[key](inputs)
        return outputs

    def _make_linear(self, name: str) -> nn.Module:
        layer = self.module(name)
        if not isinstance(layer, FormLinear):
            raise TypeError(f"{name} is a {type(layer).__name__}, not a linear layer")
        bias = None if layer.bias is None else layer.bias.detach()
        form = layer.form.without_mask()
        if not isinstance(form, AffineWeight):
            return DenseLinear(self._dense(name, layer.form), bias)
        matrix = integer_matrix(form)
        change = scale_rounding(matrix)
        if change:
            self.roundings[name] = change
        return DynamicLinear(matrix, bias)

    def _make_table(self, name: str) -> nn.Module:
        layer = self.module(name)
        if not isinstance(layer, FormEmbedding):
            raise TypeError(f"{name} is a {type(layer).__name__}, not an embedding")
        form = layer.form.without_mask()
        if isinstance(form, AffineWeight) and not form.has_float_zeros:
            return TableInteger(form)
        return TableDense(self._dense(name, layer.form))

    def _dense(self, name: str, form: WeightForm) -> Tensor:
        if not isinstance(form, DenseWeight):
            self.dense.append(name)
        return form.dequantize()


class _Constant(nn.Module):
    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values.detach().contiguous())


def _averager(width: int) -> DenseLinear:
    return DenseLinear(torch.full((1, width), 1 / width), None)


def _half_turn(width: int) -> DenseLinear:
    half = width // 2
    turn = torch.zeros(width, width)
    turn[:half, half:] = -torch.eye(half)
    turn[half:, :half] = torch.eye(half)
    return DenseLinear(turn, None)
