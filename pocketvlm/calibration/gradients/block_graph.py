"""One block's autograd graph on one batch: what every backward pass over a model is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pocketvlm.calibration.walk.sublayers import Sublayer
from pocketvlm.weights.modules import FormLinear, cache_dense_weights

__all__ = ["BlockGraph", "dense_weights", "linears_of", "record_block", "run_sublayers"]


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
    layers = {}
    for sublayer in sublayers:
        prefix = sublayer.last.rpartition(".")[0]
        for name in (*sublayer.first, sublayer.last):
            layer = sublayer.body.get_submodule(name.removeprefix(f"{prefix}."))
            layers[name] = cast("FormLinear", layer)
    return layers


def run_sublayers(
    sublayers: Sequence[Sublayer],
    arguments: Mapping[str, Any],
    hidden: Tensor,
    between: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The hidden state after a block of two sublayers; autograd may record it.

    Args:
        sublayers: Attention and the feed-forward network.
        arguments: What attention takes beside the hidden state.
        hidden: The hidden state before the block.
        between: What happens between the sublayers, such as rows that end there.
    """
    middle = sublayers[0].output(hidden, arguments)
    return sublayers[1].output(middle if between is None else between(middle), {})
