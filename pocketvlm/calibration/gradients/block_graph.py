"""One block's autograd graph on one batch: what every backward pass over a model is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pocketvlm.reference_graph.sublayers import Sublayer
from pocketvlm.weights.modules import FormLinear, cache_dense_weights

__all__ = ["BlockGraph", "dense_weights", "linears_of", "record_block"]


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockGraph:
    """What a block computed on one batch, ready to be differentiated once.

    Attributes:
        entering: The hidden state before the block, a leaf.
        leaving: The hidden state after it.
        inputs: What each linear read, by name; not part of the graph.
        outputs: What each linear gave, by name.
    """

    entering: Tensor
    leaving: Tensor
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]

    def pull(
        self, gradient: Tensor, weights: Sequence[Tensor] = ()
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
        """Carries a loss's gradient back through the block; frees the graph.

        Args:
            gradient: The loss's gradient at `leaving`.
            weights: Dense weights that were leaves when the block was recorded.

        Returns:
            The gradients at `entering`, at each linear's output by name, and of `weights`.
        """
        entering, *found = torch.autograd.grad(
            self.leaving, [self.entering, *self.outputs.values(), *weights], gradient
        )
        return (
            entering,
            dict(zip(self.outputs, found, strict=False)),
            tuple(found[len(self.outputs) :]),
        )


def record_block(
    run: Callable[[Tensor], Tensor], layers: Mapping[str, nn.Module], hidden: Tensor
) -> BlockGraph:
    """Runs a block on a batch and keeps its graph.

    Args:
        run: From the hidden state before the block to the one after it.
        layers: The linears that `run` calls, by name.
        hidden: The hidden state before the block.
    """
    leaf = hidden.detach().requires_grad_()
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def record(_module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name] = given[0].detach()
            outputs[name] = output

        return record

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            leaving = run(leaf)
    finally:
        for handle in handles:
            handle.remove()
    return BlockGraph(entering=leaf, leaving=leaving, inputs=inputs, outputs=outputs)


@contextmanager
def dense_weights(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Keeps the dense weights of a block's modules in memory inside the block of code."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(cache_dense_weights(module))
        yield


def linears_of(sublayers: Sequence[Sublayer]) -> dict[str, FormLinear]:
    """The sublayers' linears by their full names, in order of execution."""
    return {
        name: cast("FormLinear", layer)
        for sublayer in sublayers
        for name, layer in zip((*sublayer.first, sublayer.last), sublayer.linears, strict=True)
    }
