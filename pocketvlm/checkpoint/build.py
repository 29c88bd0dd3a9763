"""Builds models before any weight is read: ours from its spec, the stock one from a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pocketvlm.checkpoint.config import parse_config
from pocketvlm.errors import CheckpointError
from pocketvlm.graph.rms_norm import RMSNorm
from pocketvlm.models.layers import NormSpec
from pocketvlm.models.spec import ModelSpec

__all__ = ["build_model", "build_skeleton"]


def build_model(spec: ModelSpec) -> nn.Module:
    """The modules that a spec names, on the meta device, in a tree by their dotted names.

    They are run by `pocketvlm.reference_graph`: the tree itself has no `forward`. Blocks of
    the tower that are never run are part of it, because other tools want whole models.
    """
    tower, decoder = spec.tower, spec.decoder
    whole = replace(spec, tower=replace(tower, feature_block=tower.depth - 1, has_post_norm=True))
    root = nn.Module()
    with torch.device("meta"):
        if tower.class_embedding is not None:
            owner = _container(root, tower.embeddings)
            token = nn.Parameter(torch.empty(tower.hidden_size))
            owner.register_parameter(tower.class_embedding, token)
        patches = nn.Conv2d(
            tower.channels,
            tower.hidden_size,
            tower.patch_size,
            stride=tower.patch_size,
            bias=tower.has_patch_bias,
        )
        _place(root, tower.patch_embedding, patches)
        if tower.position_embedding is not None:
            rows = tower.tokens if tower.table_side is None else tower.table_side**2
            _place(root, tower.position_embedding, nn.Embedding(rows, tower.hidden_size))
        for conv in decoder.convolutions.values():
            width = decoder.hidden_size
            kernel = nn.Conv1d(width, width, conv.taps, groups=width, bias=conv.has_bias)
            _place(root, conv.kernel, kernel)
        norms = {norm.name: norm for norm in whole.norms()}
        for linear in whole.linears():
            if linear.name == decoder.embedding:
                table: nn.Module = nn.Embedding(linear.out_features, linear.in_features)
            else:
                table = nn.Linear(linear.in_features, linear.out_features, bias=linear.has_bias)
            _place(root, linear.name, table)
        if spec.line_break is not None:
            path, _, own = spec.line_break.rpartition(".")
            row = nn.Parameter(torch.empty(decoder.hidden_size))
            _container(root, path).register_parameter(own, row)
        if decoder.tied_head:
            head = nn.Linear(decoder.hidden_size, decoder.vocab_size, bias=False)
            _place(root, decoder.head, head)
        for norm in norms.values():
            _place(root, norm.name, _norm(norm))
    root.requires_grad_(requires_grad=False)
    return root.eval()


def _norm(norm: NormSpec) -> nn.Module:
    if norm.has_bias:
        return nn.LayerNorm(norm.width, eps=norm.eps)
    return RMSNorm(norm.width, norm.eps)


def _container(root: nn.Module, name: str) -> nn.Module:
    """The module of a dotted name, made where there is none."""
    module = root
    for part in name.split(".") if name else ():
        child = module._modules.get(part)  # noqa: SLF001  (children by name; getattr finds methods too)
        if child is None:
            child = nn.Module()
            module.add_module(part, child)
        module = child
    return module


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    _container(root, parent).add_module(own, module)


def build_skeleton(config: Mapping[str, Any]) -> Any:
    """The stock model on the meta device: which weights it has, and their names.

    Raises:
        CheckpointError: The config cannot be understood.
    """
    from transformers import AutoModelForImageTextToText

    parsed = parse_config(config)
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(
                parsed, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            )
    except Exception as error:  # modules assert, divide by and look up values of the config
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"config.json: no model can be built from it: {words}") from error
