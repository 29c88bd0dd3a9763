"""Changes of float weights that cancel: what is done to a layer's inputs, its neighbour undoes.

The stock classes of the model then still compute the same function. Products are formed in
float64 and stored in float32: bf16 would round the function itself. A masked weight keeps its mask,
whose zeros any scale leaves alone, and its float16. Where a folder is given, new dense weights lie
there in files without names, and memory holds one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.checkpoint.tensors import keep_in_file
from pocketvlm.errors import RecipeError
from pocketvlm.models.blocks import BlockSpec, ConvBlockSpec, DecoderBlock
from pocketvlm.models.decoder import DecoderSpec
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.projector import ActivationStep, GatedStep, NormStep, step_linears
from pocketvlm.models.tower import TowerSpec
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.float_weights import is_float, with_values
from pocketvlm.weights.modules import FormLinear
from pocketvlm.weights.sparse import SparseWeight

__all__ = [
    "Fold",
    "check_transformable",
    "divide_outputs",
    "find_fold",
    "fold_norm",
    "multiply_inputs",
    "read_vector",
    "rotate_inputs",
    "rotate_outputs",
    "write_vector",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fold:
    """Where the inverse of an input scale goes.

    Attributes:
        producer: Name of the norm or linear whose outputs become the inputs.
        channels: Output of the producer that each column reads, int64 [columns]: columns that share
            one must share their scale.
    """

    producer: str
    channels: Tensor


def check_transformable(checkpoint: Checkpoint, method: str) -> None:
    """Checks that nothing was fitted to the weights as they are.

    Raises:
        RecipeError: A weight is quantized, or the KV cache has its grid; the message says which.
    """
    for linear, form in checkpoint.forms().items():
        if not is_float(form):
            raise RecipeError(
                f"{method}: {linear.name} is quantized already; allowed are float weights, so "
                f"{method} comes before every quantizer"
            )
    if checkpoint.cache_grid is not None:
        raise RecipeError(
            f"{method}: the KV cache's scales are fitted to the values as they are, which "
            f"{method} changes; {method} comes before quantize_cache"
        )


def read_vector(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of a norm or the bias of a linear in float64, in main memory; `None` for none."""
    parameter = getattr(module, name, None)
    return None if parameter is None else parameter.detach().cpu().to(torch.float64)


def write_vector(module: nn.Module, name: str, values: Tensor) -> None:
    """Replaces a parameter, in float32, where the module computes."""
    values = values.to(getattr(module, name).device, torch.float32)
    setattr(module, name, nn.Parameter(values, requires_grad=False))


def multiply_inputs(checkpoint: Checkpoint, name: str, scale: Tensor, folder: Path | None) -> None:
    """Multiplies the columns of a layer's weight by `scale`, [in_features]."""
    weight = _read_weight(checkpoint, name) * scale.to(torch.float64)
    _write_weight(checkpoint, name, weight, folder)


def divide_outputs(checkpoint: Checkpoint, name: str, scale: Tensor, folder: Path | None) -> None:
    """Divides what a linear or a norm puts out, channel by channel, by `scale`, [channels]."""
    module, divisor = checkpoint.model.get_submodule(name), scale.to(torch.float64)
    if isinstance(module, FormLinear):
        weight = _read_weight(checkpoint, name)
        _write_weight(checkpoint, name, weight / divisor[:, None], folder)
    for parameter in ("bias",) if isinstance(module, FormLinear) else ("weight", "bias"):
        values = read_vector(module, parameter)
        if values is not None:
            write_vector(module, parameter, values / divisor)


def fold_norm(
    checkpoint: Checkpoint, norm: str, linears: tuple[str, ...], folder: Path | None
) -> None:
    """Moves the weight and the bias of a norm into the linears, which are all that read it.

    The norm is left with weight one and bias zero. Where it has a bias, the linears need one too.
    """
    module = checkpoint.model.get_submodule(norm)
    scale, shift = read_vector(module, "weight"), read_vector(module, "bias")
    if scale is None:
        raise TypeError(f"{norm} has no weight to fold")
    for name in linears:
        layer = checkpoint.layer(name)
        if shift is not None:
            bias = read_vector(layer, "bias")
            if bias is None:
                raise ValueError(f"{name} has no bias that could take up that of {norm}")
            write_vector(layer, "bias", bias + _read_weight(checkpoint, name) @ shift)
        multiply_inputs(checkpoint, name, scale, folder)
    write_vector(module, "weight", torch.ones_like(scale))
    if shift is not None:
        write_vector(module, "bias", torch.zeros_like(shift))


def rotate_inputs(checkpoint: Checkpoint, name: str, rotation: Tensor, folder: Path | None) -> None:
    """W -> W R, for a layer or a table: its inputs, or its rows, x^T become x^T R.

    Args:
        checkpoint: The model.
        name: The layer.
        rotation: R [d, d] for every run of d columns, or one each, [in_features / d, d, d].
        folder: Where the new weight lies.
    """
    weight, width = _read_weight(checkpoint, name), rotation.shape[-1]
    runs = weight.reshape(weight.shape[0], -1, width).transpose(0, 1)
    turned = (runs @ rotation).transpose(0, 1).reshape(weight.shape)
    _write_weight(checkpoint, name, turned, folder)


def rotate_outputs(
    checkpoint: Checkpoint, name: str, rotation: Tensor, folder: Path | None
) -> None:
    """W -> R^T W and b -> R^T b: the outputs y^T of a layer become y^T R.

    Args:
        checkpoint: The model.
        name: The layer.
        rotation: R [d, d] for every run of d rows, or one each, [out_features / d, d, d].
        folder: Where the new weight lies.
    """
    weight, width = _read_weight(checkpoint, name), rotation.shape[-1]
    runs = weight.reshape(-1, width, weight.shape[1])
    _write_weight(checkpoint, name, (rotation.mT @ runs).reshape(weight.shape), folder)
    layer = checkpoint.layer(name)
    bias = read_vector(layer, "bias")
    if bias is not None:
        write_vector(layer, "bias", (bias.reshape(-1, 1, width) @ rotation).flatten())


def find_fold(checkpoint: Checkpoint, linear: LinearSpec) -> Fold | str:
    """Where the inverse scale of a layer's inputs goes, or why it can go nowhere."""
    columns, decoder = torch.arange(linear.in_features), checkpoint.spec.decoder
    if linear.part == "decoder" and linear.block is not None:
        block = decoder.blocks[linear.block]
        return _find_in_decoder(decoder, block, linear.name, columns)
    if linear.part == "tower" and linear.block is not None:
        tower = checkpoint.spec.tower
        return _find_in_tower(tower, tower.blocks[linear.block], linear.name, columns)
    if linear.part == "projector":
        return _find_in_projector(checkpoint, linear, columns)
    if linear.part == "head":
        return Fold(producer=decoder.norm, channels=columns)
    if decoder.tied_head:
        return "head and embedding are one weight: a scale of the one would change the other"
    return "a lookup has no inputs to scale"


def _find_in_decoder(decoder: DecoderSpec, block: DecoderBlock, name: str, columns: Tensor) -> Fold:
    if isinstance(block, ConvBlockSpec):
        if name == block.conv.o:
            return Fold(producer=block.conv.c, channels=columns)
    elif name == block.attention.o:
        # The query heads of a group read the same channels of one head of v.
        width, repeats = decoder.head_dim, decoder.heads // decoder.kv_heads
        shared = columns // (width * repeats) * width + columns % width
        return Fold(producer=block.attention.v, channels=shared)
    if name == block.ffn.down:
        return Fold(producer=block.ffn.up, channels=columns)
    return Fold(producer=_norm_before(block, name), channels=columns)


def _find_in_tower(tower: TowerSpec, block: BlockSpec, name: str, columns: Tensor) -> Fold | str:
    if name == block.ffn.down:
        return f"{tower.activation} stands before it, and no scale passes through it"
    if name == block.attention.o:
        return Fold(producer=block.attention.v, channels=columns)
    return Fold(producer=_norm_before(block, name), channels=columns)


def _norm_before(block: DecoderBlock, name: str) -> str:
    return block.ffn.norm if name in block.ffn.inputs else block.mixer.norm


def _find_in_projector(checkpoint: Checkpoint, linear: LinearSpec, columns: Tensor) -> Fold | str:
    spec = checkpoint.spec
    tower, projector = spec.tower, spec.projector
    steps, place = next(
        (steps, index)
        for steps in (projector.steps, *(tap.steps for tap in spec.taps))
        for index, step in enumerate(steps)
        if linear.name in step_linears(step)
    )
    before = steps[place - 1] if place else None
    if isinstance(before, NormStep):
        return Fold(producer=before.name, channels=columns)
    if isinstance(before, ActivationStep):
        return f"{before.activation} stands before it, and no scale passes through it"
    if isinstance(before, GatedStep):
        return Fold(producer=before.up, channels=columns)
    if before is not None:
        return "another linear layer stands before it"
    norm = tower.feature_norm if projector.patch_norm is None else projector.patch_norm.name
    if norm is None or steps is not projector.steps:
        return "it reads the tower's residual stream, which no norm scales"
    if checkpoint.reducer is not None:
        return "the token reducer reads the same features, and would choose other tokens"
    # Merged patches are copies of the norm's channels, side by side.
    return Fold(producer=norm, channels=columns % tower.hidden_size)


def _read_weight(checkpoint: Checkpoint, name: str) -> Tensor:
    return checkpoint.form(name).dequantize().to(torch.float64)


def _write_weight(checkpoint: Checkpoint, name: str, weight: Tensor, folder: Path | None) -> None:
    values = weight.to(torch.float32).contiguous()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name}: the changed weight is not finite")
    form = checkpoint.form(name)
    if isinstance(form, SparseWeight):
        checkpoint.set_form(name, with_values(form, values))
    else:
        checkpoint.set_form(name, DenseWeight(values=keep_in_file(values, folder)))
