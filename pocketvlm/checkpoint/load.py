"""Loads a model whose weight matrices are read from the files one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pocketvlm.checkpoint.folder import ModelFolder
from pocketvlm.checkpoint.folding import folded_tensors
from pocketvlm.checkpoint.tensors import check_shape, read_tensor
from pocketvlm.errors import CheckpointError
from pocketvlm.json_io import DecodeError, decode
from pocketvlm.models.spec import ModelSpec
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.forms import FORMS
from pocketvlm.weights.kv_cache import KVCacheScales
from pocketvlm.weights.modules import FormEmbedding, FormLinear

__all__ = ["CACHE_PREFIX", "install_weights", "load_cache_grid", "load_weights"]

# What a weight form raises if its metadata and tensors do not match.
_FORM_ERRORS = (ValueError, KeyError, TypeError, IndexError, ArithmeticError, RuntimeError)
CACHE_PREFIX = "kv_cache."
"""Prefix of the KV cache's scales in the weights of a saved checkpoint."""


def load_weights(model: nn.Module, folder: ModelFolder) -> None:
    """Fills a model of `build_model`: each matrix becomes a `FormLinear` or `FormEmbedding`.

    Args:
        model: The model, changed in place.
        folder: The folder that holds its weights.

    Raises:
        CheckpointError: A tensor is missing, has another shape, or has no place in the model.
    """
    spec, stored, layout = folder.spec, folder.tensors, folder.layout
    forms = folder.manifest.forms if folder.manifest else {}
    taken: set[str] = set()

    def take(name: str) -> Tensor:
        if name not in stored:
            raise CheckpointError(f"{folder.path}: tensor {name} is missing from the weights")
        taken.add(name)
        return read_tensor(stored[name])

    # What this package saved is folded already.
    folded = folded_tensors(() if folder.manifest else spec.folds, take)

    def take_vector(name: str, expected: Tensor) -> Tensor:
        made = folded(name)
        if made is not None:
            return made.to(torch.float32)
        if name not in stored and not spec.runs(name):
            return torch.zeros(expected.shape)
        return take(name).to(torch.float32, copy=True)

    owned_by_several = {
        owner for name, metadata in forms.items() for owner in _owners(name, metadata).values()
    }
    kept: dict[str, Tensor] = {}

    def take_shared(name: str) -> Tensor:
        if name not in owned_by_several:
            return take(name)
        if name not in kept:
            kept[name] = take(name)
        return kept[name]

    def take_form(name: str, shape: tuple[int, int]) -> WeightForm:
        metadata = forms.get(name, {"kind": DenseWeight.kind})
        form_type = next((form for form in FORMS if form.kind == metadata.get("kind")), None)
        if form_type is None:
            raise CheckpointError(
                f"{folder.path}: {name} has a weight of kind {metadata.get('kind')!r}; known are "
                f"{', '.join(form.kind for form in FORMS)}"
            )
        made = folded(f"{name}.weight")
        if made is not None:
            return DenseWeight(values=made)
        shared_tensors = _owners(name, metadata)
        prefix = name + "."
        keys = [
            key.removeprefix(prefix)
            for key in stored
            if key.startswith(prefix) and key != prefix + "bias"
        ]
        if not keys and not spec.runs(prefix):
            return DenseWeight(values=torch.zeros(shape, dtype=torch.bfloat16))
        if not keys:
            raise CheckpointError(
                f"{folder.path}: tensor {name}.weight is missing from the weights"
            )
        own = {key: take_shared(prefix + key) for key in keys}
        others = {key: take_shared(owner) for key, owner in shared_tensors.items()}
        try:
            if layout is not None and layout.holds(keys):
                return layout.read(name, own)
            return form_type.from_tensors(own | others, metadata)
        except _FORM_ERRORS as error:
            kind = "quantized" if layout is not None else repr(metadata["kind"])
            words = " ".join(f"{type(error).__name__}: {error}".split())
            raise CheckpointError(
                f"{folder.path}: {name} is not a weight of kind {kind}: {words}"
            ) from error

    install_weights(model, spec, take_form, take_vector)
    unknown = sorted(
        name
        for name in stored.keys() - taken
        if spec.runs(name) and not name.startswith(CACHE_PREFIX)
    )
    if unknown:
        raise CheckpointError(
            f"{folder.path}: tensor {unknown[0]} ({len(unknown)} in all) has no place in a "
            f"{spec.model_type} model"
        )


def install_weights(
    model: nn.Module,
    spec: ModelSpec,
    take_form: Callable[[str, tuple[int, int]], WeightForm],
    take_vector: Callable[[str, Tensor], Tensor],
) -> None:
    """Puts weights into a model of `build_model`, which is changed in place.

    Args:
        model: The model.
        spec: What it is; a tied head takes its embedding's form.
        take_form: The weight of a layer by its name and shape.
        take_vector: Everything else, by its name and a tensor of its shape; float32.

    Raises:
        CheckpointError: A shape is not the one of the model.
    """
    decoder = spec.decoder
    tables: dict[str, WeightForm] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            shape = (module.out_features, module.in_features)
            is_tied = decoder.tied_head and name == decoder.head
            form = tables[decoder.embedding] if is_tied else take_form(name, shape)
            check_shape(name, form.shape, shape)
            bias = None
            if module.bias is not None:
                bias = take_vector(name + ".bias", module.bias)
                check_shape(name + ".bias", tuple(bias.shape), tuple(module.bias.shape))
            softcap = decoder.logit_softcap if name == decoder.head else None
            model.set_submodule(name, FormLinear(form, bias, softcap=softcap))
        elif name == decoder.embedding:
            shape = (decoder.vocab_size, decoder.hidden_size)
            form = tables[name] = take_form(name, shape)
            check_shape(name, form.shape, shape)
            model.set_submodule(name, FormEmbedding(form, scale=decoder.embed_scale))
    for name, parameter in list(model.named_parameters()):
        layer, _, last = name.rpartition(".")
        if last == "bias" and isinstance(model.get_submodule(layer), FormLinear):
            continue
        value = take_vector(name, parameter)
        check_shape(name, tuple(value.shape), tuple(parameter.shape))
        setattr(model.get_submodule(layer), last, nn.Parameter(value, requires_grad=False))


def _owners(name: str, metadata: Mapping[str, Any]) -> Mapping[str, str]:
    """Layers that hold the tensors that a layer shares, by field name."""
    try:
        return decode(dict[str, str], metadata.get("shared", {}), f"forms.{name}.shared")
    except DecodeError as error:
        raise CheckpointError(f"pocketvlm.json: {error}") from error


def load_cache_grid(folder: ModelFolder) -> KVCacheScales | None:
    """Scales of the KV cache of a saved checkpoint; `None` if it stays float32."""
    tensors = {
        name.removeprefix(CACHE_PREFIX): read_tensor(stored)
        for name, stored in folder.tensors.items()
        if name.startswith(CACHE_PREFIX)
    }
    if not tensors:
        return None
    decoder = folder.spec.decoder
    for name, scales in tensors.items():
        expected = (len(decoder.attention_blocks), decoder.kv_heads, decoder.head_dim)
        check_shape(CACHE_PREFIX + name, tuple(scales.shape), expected)
    return KVCacheScales.from_tensors(tensors)
