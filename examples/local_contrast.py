"""A reducer of visual tokens of your own: one file, outside pocketvlm.

    # recipe.yaml
    stages:
      - method: reduce_tokens
        reducer: {kind: imported, name: 'local_contrast:LocalContrast', options: {reach: 1}}
        keep: 0.5

    PYTHONPATH=examples pocketvlm plan reference:pocket-llava --recipe recipe.yaml

A plan imports the class, runs it on random pictures and traces it, and refuses in one line what no
phone could run. The bundle then holds its operators and needs this file no more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pocketvlm.compress.tokens import Ranking, ReducerInputs


@dataclass(frozen=True, kw_only=True)
class LocalContrast(Ranking):
    """Keeps the visual tokens that differ most from those beside them.

    Attributes:
        reach: Tokens from a token to those that it is compared with, in raster order.
    """

    kind: str = "local_contrast"
    reach: int = 1

    def __post_init__(self) -> None:
        if self.reach < 1:
            raise ValueError(f"reach is {self.reach}; at least 1 is needed")

    def score(self, inputs: ReducerInputs) -> Tensor:
        """How far each token's feature is from the mean of its two neighbours, [B, N]."""
        features, reach = inputs.features, min(self.reach, inputs.features.shape[1] - 1)
        before = torch.cat([features[:, :reach], features[:, :-reach]], dim=1)
        after = torch.cat([features[:, reach:], features[:, -reach:]], dim=1)
        return (features - (before + after) / 2).abs().sum(dim=-1)
