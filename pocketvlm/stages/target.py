"""Target: one export format, and what it says of a model before any compute."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pocketvlm.bundle import MOST_VARIANTS, Component
from pocketvlm.bundle.manifest import RuntimeNeeds
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import UnsupportedError, join_problems
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.spec import ModelSpec
from pocketvlm.stages.plan_state import FLOAT_CACHE_BITS, PlanState
from pocketvlm.weights.layout import WeightLayout

__all__ = ["Explanation", "Prediction", "Target"]

Layouts = Mapping[LinearSpec, WeightLayout | None]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a target makes of one matrix: what its runtime will run, or why there is nothing.

    Attributes:
        stored: How the matrix is stored and computed, in the words of the manifest.
        refusal: Why the target cannot hold it, and what would work; empty where it can.
        prices: What it costs, as sentences that begin with a number of layers.
    """

    stored: str = ""
    refusal: str = ""
    prices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a target would make of a model.

    Attributes:
        part_bytes: Bytes by part of the model, and `other` for everything else.
        warnings: What it can run at a price.
    """

    part_bytes: Mapping[str, int]
    warnings: tuple[str, ...] = ()


class Target(ABC):
    """One export format; a subclass is a frozen dataclass that is its own configuration.

    Attributes:
        cache_bits: Widths of quantized KV caches that it keeps; float32 ones are kept by all.
        supports_schedules: Whether visual rows may be dropped before the decoder's last layer.
    """

    cache_bits: ClassVar[frozenset[int]] = frozenset()
    supports_schedules: ClassVar[bool] = False

    @property
    @abstractmethod
    def method(self) -> str:
        """The tag that names the target in a recipe."""

    @abstractmethod
    def explain(
        self, layout: WeightLayout | None, shape: tuple[int, int], *, is_table: bool = False
    ) -> Explanation:
        """What the target makes of a matrix: the one answer of plan, export and manifest.

        Args:
            layout: How the matrix is stored in the checkpoint; `None` for floats.
            shape: Its rows and columns.
            is_table: Whether its rows are looked up and nothing is multiplied with it.
        """

    @abstractmethod
    def layer_bytes(self, layout: WeightLayout | None, shape: tuple[int, int], /) -> int:
        """Bytes of one matrix [rows, columns] in the files, without the graph around it.

        Raises:
            UnsupportedError: The target's files cannot hold such a matrix.
        """

    @abstractmethod
    def graph_bytes(self, spec: ModelSpec, layouts: Layouts, /) -> Mapping[str, int]:
        """Bytes of everything but the matrices, by part of the model or under `other`."""

    @abstractmethod
    def vision_bytes(self, spec: ModelSpec, /, *, is_new_size: bool) -> int:
        """Bytes of one more vision graph, beside the weights that it shares.

        Args:
            spec: The model, with the pictures of this graph.
            is_new_size: Whether no other graph takes pictures of their size.
        """

    @abstractmethod
    def capacity(self, spec: ModelSpec) -> int:
        """Rows of KV cache that a conversation with the exported model may take."""

    @abstractmethod
    def write(self, checkpoint: Checkpoint, folder: Path, ctx: RunContext) -> tuple[Component, ...]:
        """What `export` does with a checkpoint that the target can run; raises the same errors."""

    @abstractmethod
    def runtime_needs(self, folder: Path, components: Sequence[Component]) -> RuntimeNeeds:
        """What a runtime must be to read what was written as intended, read from the files.

        Args:
            folder: The bundle.
            components: What `export` returned.
        """

    @property
    def missing_toolkit(self) -> str | None:
        """What has to be installed before anything can be exported; `None` where all is there."""
        return None

    def explain_layer(
        self, spec: ModelSpec, linear: LinearSpec, layout: WeightLayout | None
    ) -> Explanation:
        """What the target makes of a layer's matrix; a table that no head shares is looked up."""
        is_table = linear.part == "embedding" and not spec.decoder.tied_head
        return self.explain(layout, linear.shape, is_table=is_table)

    def predict(
        self, spec: ModelSpec, layouts: Layouts, *, others: Sequence[ModelSpec] = ()
    ) -> Prediction:
        """What the export would weigh and cost, before any compute.

        Args:
            spec: The model.
            layouts: What each layer will be stored as; those that are refused weigh nothing.
            others: The model once more for each other vision graph, with the pictures of that.
        """
        parts: Counter[str] = Counter()
        prices: Counter[str] = Counter()
        for linear, layout in layouts.items():
            found = self.explain_layer(spec, linear, layout)
            if not found.refusal:
                parts[linear.part] += self.layer_bytes(layout, linear.shape)
            prices.update(found.prices)
        parts.update(self.graph_bytes(spec, layouts))
        sizes = {(spec.tower.height, spec.tower.width)}
        for other in others:
            size = (other.tower.height, other.tower.width)
            parts["other"] += self.vision_bytes(other, is_new_size=size not in sizes)
            sizes.add(size)
        return Prediction(
            part_bytes=dict(parts),
            warnings=tuple(
                f"{self.method}: {count} layers {price}" for price, count in prices.items()
            ),
        )

    def refuse(self, state: PlanState) -> tuple[str, ...]:
        """What of a model the target cannot run, each with what would work."""
        found = (
            (linear.name, self.explain_layer(state.spec, linear, layout).refusal)
            for linear, layout in state.layouts.items()
        )
        refused = _join_layers((name, reason) for name, reason in found if reason)
        if state.cache_bits != FLOAT_CACHE_BITS and state.cache_bits not in self.cache_bits:
            refused.append(
                f"keeps no KV cache of {state.cache_bits} bits; leave quantize_cache out of the "
                "stages for this target"
            )
        if state.visual_schedule is not None and not self.supports_schedules:
            refused.append(
                "runs every row through every decoder layer; leave drop_tokens out of the stages "
                "for this target (reduce_tokens runs everywhere), or export to ONNX alone"
            )
        graphs = 1 + len(state.other_vision)
        if graphs > MOST_VARIANTS:
            refused.append(
                f"holds up to {MOST_VARIANTS} vision graphs, and {graphs} are asked for; give "
                "reduce_tokens fewer numbers to keep, or set_resolution fewer sizes"
            )
        return tuple(f"{self.method}: {reason}" for reason in refused)

    def export(
        self, checkpoint: Checkpoint, folder: Path, ctx: RunContext
    ) -> tuple[Component, ...]:
        """Writes the target's graphs below `folder` and describes them.

        Args:
            checkpoint: What to export.
            folder: The bundle; a folder with the target's name is created in it.
            ctx: Told about each step.

        Raises:
            MissingExtraError: The target's toolkit is not installed.
            UnsupportedError: The checkpoint holds what the target cannot run.
            ExportError: The toolkit refuses the model.
        """
        refused = self.refuse(PlanState.of_checkpoint(checkpoint))
        if refused:
            raise UnsupportedError(join_problems(refused))
        return self.write(checkpoint, folder, ctx)


def _join_layers(refusals: Iterable[tuple[str, str]]) -> list[str]:
    """One line for each reason, with the first layer that it is about and how many others."""
    layers: dict[str, list[str]] = {}
    for name, reason in refusals:
        layers.setdefault(reason, []).append(name)
    return [
        f"{names[0]}{'' if len(names) == 1 else f' and {len(names) - 1} more'}: {reason}"
        for reason, names in layers.items()
    ]
