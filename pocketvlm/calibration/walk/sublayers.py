"""A transformer block as its two sublayers, x + body(norm(x)): what calibration walks along.

All families build their blocks this way. Running a sublayer at a time means that attention is
computed twice for its two sets of linears, where re-running whole blocks would compute it four
times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pocketvlm.models.spec import AttentionSpec, BlockSpec, FfnSpec, ModelSpec

__all__ = ["Sublayer", "decoder_sublayers", "tower_sublayers"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sublayer:
    """Attention or the feed-forward network of one block, with its norm and its residual.

    Attributes:
        kind: Which sublayer it is.
        norm: What is applied to the hidden state first.
        body: What follows.
        first: Names of the linears that read the norm's output.
        first_modules: These linears.
        last: Name of the linear that ends the body.
        last_module: That linear.
    """

    kind: Literal["attention", "ffn"]
    norm: nn.Module
    body: nn.Module
    first: tuple[str, ...]
    first_modules: tuple[nn.Module, ...]
    last: str
    last_module: nn.Module

    @torch.no_grad()
    def inputs_of_last(self, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """What the last linear reads, [batch, tokens, width]; it is not run itself."""

        def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _ReachedError(inputs[0])

        handle = self.last_module.register_forward_pre_hook(stop)
        try:
            self.body(self.norm(hidden), **arguments)
        except _ReachedError as reached:
            return reached.inputs
        finally:
            handle.remove()
        raise AssertionError(f"{self.last} was not reached")

    def output(self, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """The hidden state after this sublayer, of the same shape; autograd may record it."""
        output = self.body(self.norm(hidden), **arguments)
        return hidden + (output[0] if isinstance(output, tuple) else output)

    @torch.no_grad()
    def run(self, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """`output` without autograd."""
        return self.output(hidden, arguments)


class _ReachedError(Exception):
    """Carries a linear's input out of the forward pass that was only run for it."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs


def tower_sublayers(model: nn.Module, spec: ModelSpec, block: int) -> tuple[Sublayer, Sublayer]:
    """Both sublayers of a block of the vision tower."""
    return _sublayers(model, spec.tower.blocks[block])


def decoder_sublayers(model: nn.Module, spec: ModelSpec, block: int) -> tuple[Sublayer, Sublayer]:
    """Both sublayers of a block of the decoder."""
    return _sublayers(model, spec.decoder.blocks[block])


def _sublayers(model: nn.Module, block: BlockSpec) -> tuple[Sublayer, Sublayer]:
    return (
        _sublayer(model, "attention", block.attention),
        _sublayer(model, "ffn", block.ffn),
    )


def _sublayer(
    model: nn.Module, kind: Literal["attention", "ffn"], described: AttentionSpec | FfnSpec
) -> Sublayer:
    return Sublayer(
        kind=kind,
        norm=model.get_submodule(described.norm),
        body=model.get_submodule(described.module),
        first=described.inputs,
        first_modules=tuple(model.get_submodule(name) for name in described.inputs),
        last=described.output,
        last_module=model.get_submodule(described.output),
    )
