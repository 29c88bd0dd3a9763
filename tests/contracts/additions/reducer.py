"""A reducer of visual tokens that the package lacks: the tokens of the largest feature norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pocketvlm.compress.tokens.rank.ranking import Ranking
from pocketvlm.models.reducer import ReducerInputs


@dataclass(frozen=True, kw_only=True)
class LargestFeatures(Ranking):
    """Keeps the tokens whose features are largest in a norm."""

    kind: Literal["largest_features"] = "largest_features"
    norm: int = 2

    def score(self, inputs: ReducerInputs) -> Tensor:
        return inputs.features.abs().pow(self.norm).sum(-1)
