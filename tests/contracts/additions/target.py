"""A target that the package lacks: the weights as float16 arrays, one archive per part.

It has no operators, so nothing runs it: what it shows is what the contract asks of a target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pocketvlm.bundle import Component
from pocketvlm.bundle.manifest import RuntimeNeeds
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages import Explanation, Target
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

    def explain(
        self, layout: WeightLayout | None, shape: tuple[int, int], *, is_table: bool = False
    ) -> Explanation:
        return Explanation(stored="float16")

    def layer_bytes(self, layout: WeightLayout | None, shape: tuple[int, int], /) -> int:
        return 2 * shape[0] * shape[1]

    def graph_bytes(
        self, spec: ModelSpec, layouts: Mapping[LinearSpec, WeightLayout | None], /
    ) -> Mapping[str, int]:
        return {}

    def vision_bytes(self, spec: ModelSpec, /, *, is_new_size: bool) -> int:
        return 0

    def capacity(self, spec: ModelSpec) -> int:
        return spec.decoder.max_positions

    def runtime_needs(self, folder: Path, components: Sequence[Component]) -> RuntimeNeeds:
        return RuntimeNeeds(runtime="numpy", lowest_version="1.0", formats={"npz": 1})

    def write(self, checkpoint: Checkpoint, folder: Path, ctx: RunContext) -> tuple[Component, ...]:
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
