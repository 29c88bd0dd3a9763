"""Loading: a stock model whose weight matrices are read from the files one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pocketvlm.cache_grid import CacheGrid
from pocketvlm.checkpoint.config import parse_config
from pocketvlm.checkpoint.weight_files import index_tensors, read_tensor
from pocketvlm.errors import CheckpointError
from pocketvlm.layouts import StoredLayout
from pocketvlm.modelspec import ModelSpec
from pocketvlm.weights import FORMS, DenseWeight, FormEmbedding, FormLinear, WeightForm

__all__ = ["CACHE_PREFIX", "build_model", "check_shape", "load_cache_grid", "load_weights"]

CACHE_PREFIX = "kv_cache."
"""What the names of the KV cache's scales begin with, in the weights of a saved checkpoint."""


class _MatricesOnMeta(TorchFunctionMode):
    """Gives memory to vectors and buffers, none to matrices, which are loaded one by one."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            shape = args[0] if args and isinstance(args[0], tuple | list) else args
            if len(shape) > 1:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_model(config: Mapping[str, Any]) -> nn.Module:
    """The stock model of a config.json, in float32, its weight matrices without memory.

    Raises:
        CheckpointError: The config cannot be understood.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    parsed = parse_config(config)
    with _MatricesOnMeta(), no_init_weights():
        model: nn.Module = AutoModelForImageTextToText.from_config(parsed, dtype=torch.float32)
    model.requires_grad_(requires_grad=False)
    return model.eval()


def load_weights(
    model: nn.Module,
    spec: ModelSpec,
    files: Sequence[Path],
    forms: Mapping[str, Any],
    layout: StoredLayout | None,
) -> None:
    """Fills a model of `build_model`: each matrix becomes a `FormLinear` or `FormEmbedding`.

    Args:
        model: The model, changed in place.
        spec: Where its parts are.
        files: The weight files.
        forms: What pocketvlm.json says of weights that are not dense, by layer.
        layout: How another tool stored its quantized layers, or `None`.

    Raises:
        CheckpointError: A tensor is missing, has another shape, or has no place in the model.
    """
    stored = index_tensors(files, spec)
    taken: set[str] = set()

    def take(name: str) -> Tensor:
        if name not in stored:
            raise CheckpointError(f"{files[0].parent}: tensor {name} is missing from the weights")
        taken.add(name)
        file, key = stored[name]
        return read_tensor(file, key)

    owned_by_several = {
        owner for metadata in forms.values() for owner in metadata.get("shared", {}).values()
    }
    kept: dict[str, Tensor] = {}

    def take_shared(name: str) -> Tensor:
        if name not in owned_by_several:
            return take(name)
        if name not in kept:
            kept[name] = take(name)
        return kept[name]

    def take_form(name: str) -> WeightForm:
        metadata = forms.get(name, {"kind": DenseWeight.kind})
        form_type = next((form for form in FORMS if form.kind == metadata["kind"]), None)
        if form_type is None:
            raise CheckpointError(
                f"{files[0].parent}: {name} has a weight of kind {metadata['kind']!r}; known are "
                f"{', '.join(form.kind for form in FORMS)}"
            )
        shared_tensors = metadata.get("shared", {})
        prefix = name + "."
        keys = [
            key.removeprefix(prefix)
            for key in stored
            if key.startswith(prefix) and key != prefix + "bias"
        ]
        if not keys:
            raise CheckpointError(
                f"{files[0].parent}: tensor {name}.weight is missing from the weights"
            )
        own = {key: take_shared(prefix + key) for key in keys}
        if layout is not None and layout.holds(keys):
            return layout.read(name, own)
        others = {key: take_shared(owner) for key, owner in shared_tensors.items()}
        return form_type.from_tensors(own | others, metadata)

    shared: dict[str, WeightForm] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            is_tied = spec.decoder.tied_head and name == spec.decoder.head
            source = spec.decoder.embedding if is_tied else name
            form = shared[source] if is_tied else take_form(source)
            check_shape(name, form.shape, (module.out_features, module.in_features))
            bias = take(name + ".bias") if module.bias is not None else None
            model.set_submodule(name, FormLinear(form, bias))
        elif name == spec.decoder.embedding:
            form = shared[name] = take_form(name)
            expected = (spec.decoder.vocab_size, spec.decoder.hidden_size)
            check_shape(name, form.shape, expected)
            model.set_submodule(name, FormEmbedding(form))
    for name, parameter in list(model.named_parameters()):
        if name in taken:
            continue
        value = take(name).to(torch.float32)
        check_shape(name, tuple(value.shape), tuple(parameter.shape))
        owner = model.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(value, requires_grad=False))
    tied_copy = spec.decoder.head + ".weight" if spec.decoder.tied_head else None
    scales = {name for name in stored if name.startswith(CACHE_PREFIX)}
    unknown = sorted(stored.keys() - taken - scales - {tied_copy})
    if unknown:
        raise CheckpointError(
            f"{files[0].parent}: tensor {unknown[0]} ({len(unknown)} in all) has no place in a "
            f"{spec.model_type} model"
        )


def load_cache_grid(spec: ModelSpec, files: Sequence[Path]) -> CacheGrid | None:
    """What the KV cache of a saved checkpoint is rounded to; `None` where it stays float32."""
    stored = index_tensors(files, spec)
    tensors = {
        name.removeprefix(CACHE_PREFIX): read_tensor(*stored[name])
        for name in stored
        if name.startswith(CACHE_PREFIX)
    }
    if not tensors:
        return None
    decoder = spec.decoder
    for name, scales in tensors.items():
        expected = (decoder.depth, decoder.kv_heads, decoder.head_dim)
        check_shape(CACHE_PREFIX + name, tuple(scales.shape), expected)
    return CacheGrid.from_tensors(tensors)


def check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Holds a tensor's shape to the one that config.json implies.

    Raises:
        CheckpointError: They differ.
    """
    if found != expected:
        raise CheckpointError(f"tensor {name} is {found}, config.json says {expected}")
