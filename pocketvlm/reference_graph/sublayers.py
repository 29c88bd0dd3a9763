"""A transformer block as its two sublayers, x + body(norm(x)), each runnable on its own.

Whatever works on a model layer by layer (calibration, gradients, pruning) walks along these; the
bodies are those of the phone's graphs. Running a sublayer at a time means that attention is
computed twice for its two sets of linears, where re-running whole blocks would compute it four
times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from pocketvlm.graph.sublayers import (
    decoder_mixer,
    feed_forward,
    mixer_output,
    tower_attention,
)
from pocketvlm.graph.token_merging import TowerTokens
from pocketvlm.models.blocks import AttentionSpec, FfnSpec, ShortConvSpec
from pocketvlm.models.spec import ModelSpec
from pocketvlm.reference_graph.decoder_rows import DecoderRows
from pocketvlm.reference_graph.torch_ops import TorchOps

__all__ = [
    "Sublayer",
    "SublayerKind",
    "SublayerRows",
    "decoder_sublayers",
    "run_sublayers",
    "tower_sublayers",
]

SublayerKind = Literal["attention", "ffn"]
SublayerRows = DecoderRows | TowerTokens
"""What attention takes beside the hidden state: in the decoder; in the tower, once it has merged
tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sublayer:
    """Attention or the feed-forward network of one block, with its norm and its residual.

    Attributes:
        kind: Which sublayer it is; a short convolution stands in place of attention.
        norm: What is applied to the hidden state first.
        body: What follows, from the norm's output and what attention takes beside it.
        first: Names of the linears that read the norm's output.
        first_modules: These linears.
        last: Name of the linear that ends the body.
        last_module: That linear.
        width: Channels of the hidden state. What stands after them are features of earlier blocks,
            which pass as they are.
        is_feature: Whether the hidden state after it is such a feature.
    """

    kind: SublayerKind
    norm: nn.Module
    body: Callable[[Tensor, SublayerRows | None], Tensor]
    first: tuple[str, ...]
    first_modules: tuple[nn.Module, ...]
    last: str
    last_module: nn.Module
    width: int
    is_feature: bool = False

    @property
    def linears(self) -> nn.ModuleList:
        """Every linear of it, in order of execution."""
        return nn.ModuleList((*self.first_modules, self.last_module))

    @torch.no_grad()
    def inputs_of_last(self, hidden: Tensor, rows: SublayerRows | None) -> Tensor:
        """What the last linear reads, [batch, tokens, width]; it is not run itself."""

        def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _ReachedError(inputs[0])

        handle = self.last_module.register_forward_pre_hook(stop)
        try:
            self.body(self.normed(hidden), rows)
        except _ReachedError as reached:
            return reached.inputs
        finally:
            handle.remove()
        raise AssertionError(f"{self.last} was not reached")

    def own(self, hidden: Tensor) -> Tensor:
        """The hidden state without the features that it carries, [batch, tokens, width]."""
        return hidden[..., : self.width]

    def normed(self, hidden: Tensor) -> Tensor:
        """What the body reads."""
        return cast("Tensor", self.norm(self.own(hidden)))

    def output(self, hidden: Tensor, rows: SublayerRows | None) -> Tensor:
        """The hidden state after this sublayer, with all features; autograd may record it.

        Args:
            hidden: [batch, tokens, width], and the features of earlier blocks after it.
            rows: What attention takes beside it; `None` in a tower that has merged no tokens.
        """
        after = self.own(hidden) + self.body(self.normed(hidden), rows)
        carried = hidden[..., self.width :]
        if not self.is_feature and not carried.shape[-1]:
            return after
        return torch.cat([after, carried, *([after] if self.is_feature else [])], dim=-1)

    @torch.no_grad()
    def run(self, hidden: Tensor, rows: SublayerRows | None) -> Tensor:
        """`output` without autograd."""
        return self.output(hidden, rows)


class _ReachedError(Exception):
    """Carries a linear's input out of the forward pass that was only run for it."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs


def tower_sublayers(model: nn.Module, spec: ModelSpec, block: int) -> tuple[Sublayer, Sublayer]:
    """Both sublayers of a block of the vision tower."""
    described = spec.tower.blocks[block]

    def attend(normed: Tensor, rows: SublayerRows | None) -> Tensor:
        sizes = None
        if isinstance(rows, TowerTokens) and spec.tower.weighs_tokens(block):
            sizes = rows.sizes
        return tower_attention(TorchOps(model, spec), described.attention, normed, sizes)[0]

    def widen(normed: Tensor, _: SublayerRows | None) -> Tensor:
        return feed_forward(TorchOps(model, spec), described.ffn, normed, spec.tower.activation)

    return (
        _sublayer(model, "attention", described.attention, attend, spec.tower.hidden_size),
        replace(
            _sublayer(model, "ffn", described.ffn, widen, spec.tower.hidden_size),
            is_feature=block in spec.tower.earlier_features,
        ),
    )


def decoder_sublayers(model: nn.Module, spec: ModelSpec, block: int) -> tuple[Sublayer, Sublayer]:
    """Both sublayers of a block of the decoder."""
    described = spec.decoder.blocks[block]

    def mix(normed: Tensor, rows: SublayerRows | None) -> Tensor:
        ops = TorchOps(model, spec, context=_decoder_rows(rows))
        joined = ops.linear(normed, *described.mixer.inputs)
        mixed = decoder_mixer(ops, described.mixer, block, joined)
        return mixer_output(ops, described.mixer, mixed)

    def widen(normed: Tensor, rows: SublayerRows | None) -> Tensor:
        ops, beside = TorchOps(model, spec), _decoder_rows(rows)
        inner = feed_forward(ops, described.ffn, normed, spec.decoder.activation)
        return inner if beside is None else beside.add(block, inner)

    return (
        _sublayer(model, "attention", described.mixer, mix, spec.decoder.hidden_size),
        _sublayer(model, "ffn", described.ffn, widen, spec.decoder.hidden_size),
    )


def _decoder_rows(rows: SublayerRows | None) -> DecoderRows | None:
    if isinstance(rows, TowerTokens):
        raise TypeError("the decoder was given what tokens of a tower stand for")
    return rows


def run_sublayers(
    sublayers: tuple[Sublayer, ...],
    rows: SublayerRows | None,
    hidden: Tensor,
    *,
    before: Callable[[Tensor], Tensor] = lambda states: states,
    between: Callable[[Tensor], Tensor] = lambda states: states,
) -> Tensor:
    """The hidden state after a block of two sublayers; autograd may record it.

    Args:
        sublayers: Attention and the feed-forward network.
        rows: What attention takes beside the hidden state.
        hidden: The hidden state before the block.
        before: What happens before the sublayers, such as rows that are dropped there.
        between: What happens between them, likewise.
    """
    middle = sublayers[0].output(before(hidden), rows)
    return sublayers[1].output(between(middle), rows)


def _sublayer(
    model: nn.Module,
    kind: SublayerKind,
    described: AttentionSpec | ShortConvSpec | FfnSpec,
    body: Callable[[Tensor, SublayerRows | None], Tensor],
    width: int,
) -> Sublayer:
    return Sublayer(
        kind=kind,
        norm=model.get_submodule(described.norm),
        body=body,
        first=described.inputs,
        first_modules=tuple(model.get_submodule(name) for name in described.inputs),
        last=described.output,
        last_module=model.get_submodule(described.output),
        width=width,
    )
