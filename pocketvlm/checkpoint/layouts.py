"""Layouts of other tools: the weights that each holds, and what its config.json says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import torch
from torch import Tensor

from pocketvlm.checkpoint.checkpoint import Checkpoint
from pocketvlm.errors import UnsupportedError, name_some
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.codebook import CodebookWeight
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.formats import (
    compressed_tensors_config,
    gptq_config,
    to_compressed_tensors,
    to_gptq,
    to_vptq,
    vptq_layer_config,
)
from pocketvlm.weights.modules import FormLinear

__all__ = ["LAYOUTS", "QUANTIZER", "Layers", "Layout"]

QUANTIZER = "pocketvlm"
_ROUNDED_SCALE = 2.0**-9
"""The most by which bfloat16 changes a float16, relatively: half a unit of its 8 bits."""


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The linear layers of a checkpoint, by name.

    Attributes:
        checkpoint: The checkpoint.
        linears: Every one that has its own weight, including blocks that are never run.
        quantized: The weights that a layout keeps as they are.
    """

    checkpoint: Checkpoint
    linears: Mapping[str, FormLinear]
    quantized: Mapping[str, AffineWeight | CodebookWeight]

    @classmethod
    def of(cls, checkpoint: Checkpoint, layout: Layout) -> Layers:
        """The layers, of which some must have a weight of the layout's kind.

        Raises:
            UnsupportedError: No layer is quantized, or one has a form that the layout cannot hold.
        """
        decoder = checkpoint.spec.decoder
        linears = {
            name: module
            for name, module in checkpoint.model.named_modules()
            if isinstance(module, FormLinear) and not (decoder.tied_head and name == decoder.head)
        }
        quantized: dict[str, AffineWeight | CodebookWeight] = {}
        for name, module in linears.items():
            form = module.form
            if isinstance(form, DenseWeight):
                continue
            if not isinstance(form, layout.form):
                raise UnsupportedError(
                    f"{name}: has a weight of kind {form.kind!r}, and layout {layout.name} holds "
                    f"{layout.form.kind!r} and float weights alone"
                )
            quantized[name] = form
        if not quantized:
            raise UnsupportedError(
                f"no linear layer is quantized; layout {layout.name} is for {layout.form.kind!r} "
                "weights, which a quantizing stage makes"
            )
        return cls(checkpoint=checkpoint, linears=linears, quantized=quantized)

    def affine(self) -> dict[str, AffineWeight | None]:
        """Every linear layer's integers; `None` for one that stays float."""
        found: dict[str, AffineWeight | None] = dict.fromkeys(self.linears)
        for name, form in self.quantized.items():
            found[name] = form if isinstance(form, AffineWeight) else None
        return found


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One layout.

    Attributes:
        name: What `--layout` calls it.
        form: The kind of weight that it holds.
        tensors: The tensors of a layer by their last names, from its name and weight.
        declare: The `quantization_config`.
        notes: What readers of a declared checkpoint may stumble over.
        bias_type: The float type of quantized layers' biases, where it is exact.
        has_own_file: Whether the configuration stands in quantize_config.json too.
    """

    name: str
    form: type[AffineWeight | CodebookWeight]
    tensors: Callable[[str, Any], dict[str, Tensor]]
    declare: Callable[[Layers], dict[str, Any]]
    notes: Callable[[Layers, Mapping[str, Any]], list[str]]
    bias_type: torch.dtype = torch.float16
    has_own_file: bool = False


def _gptq(name: str, version: Literal[1, 2]) -> Layout:
    def declare(layers: Layers) -> dict[str, Any]:
        spec = layers.checkpoint.spec
        parts = (
            spec.tower.prefix,
            spec.projector.linears[0].rpartition(".")[0],
            spec.decoder.prefix,
        )
        return gptq_config(
            layers.affine(),
            parts,
            version=version,
            head=spec.decoder.head,
            quantizer=_quantizer(),
        )

    return Layout(
        name=name,
        form=AffineWeight,
        tensors=lambda layer, form: to_gptq(layer, form, version=version),
        declare=declare,
        notes=_gptq_notes,
        has_own_file=True,
    )


def _gptq_notes(layers: Layers, declared: Mapping[str, Any]) -> list[str]:
    notes = []
    short = [
        name
        for name, form in layers.affine().items()
        if form is not None and form.groups > 1 and form.in_features % form.group_size
    ]
    if short:
        notes.append(
            f"{len(short)} layers end in a short group, which g_idx tells and vLLM refuses: "
            f"{short[0]} is the first"
        )
    if "modules_in_block_to_quantize" not in declared:
        rules = [key.removeprefix("+:") for key in declared["dynamic"] if key.startswith("+:")]
        notes.append(
            "layers differ in bits, group size or symmetry, which GPTQModel and vLLM read and "
            f"transformers does not (--layout compressed-tensors is read by it): {name_some(rules)}"
        )
    return notes


def _declare_compressed_tensors(layers: Layers) -> dict[str, Any]:
    declared = compressed_tensors_config(layers.affine(), quantizer=_quantizer())
    decoder = layers.checkpoint.spec.decoder
    if decoder.tied_head:
        declared["ignore"].append(decoder.head)
    return declared


def _compressed_tensors_notes(layers: Layers, _: Mapping[str, Any]) -> list[str]:
    config = layers.checkpoint.config
    stored = config.get("dtype") or config.get("torch_dtype")
    notes = []
    if stored == "bfloat16":
        notes.append(
            "config.json says bfloat16, in which readers round scales, each by up to "
            f"{_ROUNDED_SCALE:.1%}: dtype=torch.float16 or float32 at from_pretrained loads these "
            "weights exactly"
        )
    affine = {name: form for name, form in layers.affine().items() if form is not None}
    asymmetric = [name for name, form in affine.items() if form.zeros is not None]
    if asymmetric:
        notes.append(
            "asymmetric layers are read by vLLM, and not by transformers (5.24, with "
            "compressed-tensors 0.20), which builds their zero points in another shape; symmetric: "
            f"true quantizes for both: {name_some(asymmetric)}"
        )
    decoder = layers.checkpoint.spec.decoder
    if any(not name.startswith((decoder.prefix, decoder.head)) for name in affine):
        notes.append(
            "transformers unpacks weights at the model's first call, and its generate runs the "
            "tower before that: call the model with one token first"
        )
    if any(form.bits == 3 for form in affine.values()):  # noqa: PLR2004  (three bits)
        notes.append("3-bit codes are read by compressed-tensors 0.18 and newer")
    return notes


def _declare_vptq(layers: Layers) -> dict[str, Any]:
    decoder = layers.checkpoint.spec.decoder
    floats = [name for name in layers.linears if name not in layers.quantized]
    return {
        "quant_method": "vptq",
        "config_for_layers": {
            name: vptq_layer_config(form, has_bias=layers.linears[name].bias is not None)
            for name, form in layers.quantized.items()
            if isinstance(form, CodebookWeight)
        },
        "shared_layer_config": {},
        "modules_to_not_convert": [*floats, *([decoder.head] if decoder.tied_head else [])],
        "meta": {"quantizer": [_quantizer()]},
    }


def _quantizer() -> str:
    return f"{QUANTIZER}:{metadata.version(QUANTIZER)}"


LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        _gptq("gptq", 1),
        _gptq("gptq_v2", 2),
        Layout(
            name="compressed-tensors",
            form=AffineWeight,
            tensors=to_compressed_tensors,
            declare=_declare_compressed_tensors,
            notes=_compressed_tensors_notes,
            bias_type=torch.bfloat16,
        ),
        Layout(
            name="vptq",
            form=CodebookWeight,
            tensors=to_vptq,
            declare=_declare_vptq,
            notes=lambda _, __: [],
        ),
    )
}
