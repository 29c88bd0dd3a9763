"""The tower's hidden states block by block, with what their tokens stand for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from pocketvlm.graph.sublayers import tower_heads
from pocketvlm.graph.token_merging import TowerTokens, merge_tokens
from pocketvlm.models.spec import ModelSpec
from pocketvlm.models.token_merging import TokenMerge
from pocketvlm.reference_graph.sublayers import tower_sublayers
from pocketvlm.reference_graph.torch_ops import TorchOps

__all__ = [
    "TowerState",
    "match_after",
    "run_tower_attention",
    "run_tower_block",
    "tower_queries_and_keys",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class TowerState:
    """What enters or leaves a block of the tower.

    Attributes:
        hidden: [images, tokens, hidden], and the features of earlier blocks after it.
        tokens: What the tokens stand for; `None` where none was merged.
    """

    hidden: Tensor
    tokens: TowerTokens | None = None

    @property
    def restored(self) -> Tensor:
        """States of all tokens that the tower began with."""
        return self.hidden if self.tokens is None else self.tokens.restore(self.hidden)


def run_tower_block(model: nn.Module, spec: ModelSpec, block: int, state: TowerState) -> TowerState:
    """One block of the tower."""
    _, ffn = tower_sublayers(model, spec, block)
    middle = run_tower_attention(model, spec, block, state)
    return replace(middle, hidden=ffn.output(middle.hidden, middle.tokens))


def run_tower_attention(
    model: nn.Module, spec: ModelSpec, block: int, state: TowerState
) -> TowerState:
    """The attention of a block, and the merge of tokens that may follow it."""
    attention, _ = tower_sublayers(model, spec, block)
    hidden, merge = attention.output(state.hidden, state.tokens), spec.tower.merge_in(block)
    if merge is None:
        return replace(state, hidden=hidden)
    target = match_after(model, spec, merge, state.hidden, hidden)
    hidden, tokens = merge_tokens(hidden, target, spec.tower.tokens_after(merge), state.tokens)
    return TowerState(hidden=hidden, tokens=tokens)


def match_after(
    model: nn.Module, spec: ModelSpec, merge: TokenMerge, entering: Tensor, attended: Tensor
) -> Tensor:
    """The token that each token becomes part of after a block's attention, int64 [images, tokens].

    Args:
        model: The model.
        spec: Where its parts are.
        merge: The rule.
        entering: What entered the block, [images, tokens, hidden].
        attended: What its attention has left, likewise.
    """
    queries, keys = tower_queries_and_keys(model, spec, merge.block, entering)
    return TorchOps(model, spec).match_tokens(merge, attended, queries, keys)


def tower_queries_and_keys(
    model: nn.Module, spec: ModelSpec, block: int, entering: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and keys of a block, each [images, tokens, hidden], from what enters it."""
    ops, attention = TorchOps(model, spec), spec.tower.blocks[block].attention
    normed = ops.norm(entering[..., : spec.tower.hidden_size], attention.norm)
    queries, keys, _ = tower_heads(ops, attention, normed)
    return queries, keys
