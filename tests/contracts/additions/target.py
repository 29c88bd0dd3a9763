"""A target that the package lacks: the weights as float16 arrays, one archive per part.

It has no operators, so nothing runs it: what it shows is what the contract asks of a target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from pocketvlm.bundle import Component
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import UnsupportedError
from pocketvlm.models.spec import LinearSpec, ModelSpec
from pocketvlm.stages import FLOAT_CACHE_BITS, PlanState, Prediction, Target
from pocketvlm.weights.layout import WeightLayout

Role = Literal["vision", "embedding", "decoder"]
_PARTS: dict[str, Role] = {
    "tower": "vision",
    "projector": "vision",
    "embedding": "embedding",
    "decoder": "decoder",
    "head": "decoder",
}


@dataclass(frozen=True, kw_only=True)
class ToArrays(Target):
    """Writes dense weights for numpy."""

    method: Literal["arrays"] = "arrays"

    def predict(
        self, spec: ModelSpec, layouts: Mapping[LinearSpec, WeightLayout | None], /
    ) -> Prediction:
        sizes: dict[str, int] = {}
        for linear, layout in layouts.items():
            count = self.layer_bytes(layout, (linear.out_features, linear.in_features))
            sizes[linear.part] = sizes.get(linear.part, 0) + count
        return Prediction(part_bytes=sizes)

    def layer_bytes(self, layout: WeightLayout | None, shape: tuple[int, int], /) -> int:
        return 2 * shape[0] * shape[1]

    def capacity(self, spec: ModelSpec) -> int:
        return spec.decoder.max_positions

    def export(
        self, checkpoint: Checkpoint, folder: Path, ctx: RunContext
    ) -> tuple[Component, ...]:
        grid = checkpoint.cache_grid
        state = replace(
            PlanState.of(checkpoint.spec),
            visual_layers=checkpoint.visual_layers,
            cache_bits=FLOAT_CACHE_BITS if grid is None else grid.bits,
        )
        for reason in self.refuse(state):
            raise UnsupportedError(reason)
        (folder / self.method).mkdir()
        arrays: dict[Role, dict[str, np.ndarray]] = {}
        for linear, form in checkpoint.forms().items():
            dense = form.dequantize().numpy().astype(np.float16)
            arrays.setdefault(_PARTS[linear.part], {})[linear.name] = dense
        components = []
        for role, weights in arrays.items():
            file = f"{self.method}/{role}.npz"
            np.savez(folder / file, **weights)
            components.append(
                Component(target=self.method, role=role, file=file, inputs=(), outputs=())
            )
        return tuple(components)
