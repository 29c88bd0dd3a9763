"""A reducer of visual tokens that the package lacks: the tokens of the largest feature norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pocketvlm.compress.tokens.reducer import Reducer
from torch import Tensor

from pocketvlm.compress.tokens.rank.ranking import gather_tokens
from pocketvlm.models.reducer import PositionPolicy, ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class LargestFeatures(Reducer):
    """Keeps the tokens whose features are largest in a norm."""

    kind: Literal["largest_features"] = "largest_features"
    norm: int = 2

    def build(self, spec: ModelSpec, *, keep: int, positions: PositionPolicy) -> TokenReducer:
        return _Module(self.norm, keep=keep, positions=positions)


class _Module(TokenReducer):
    def __init__(self, norm: int, *, keep: int, positions: PositionPolicy) -> None:
        super().__init__(keep=keep, positions=positions)
        self.norm = norm

    def forward(self, inputs: ReducerInputs) -> tuple[Tensor, Tensor]:
        sizes = inputs.features.abs().pow(self.norm).sum(-1)
        indices = sizes.topk(self.keep, dim=-1).indices.sort(dim=-1).values
        return gather_tokens(inputs.features, indices), indices
