"""States of the model as it is now and, beside them, of the float model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from pocketvlm.calibration.walk.activations import ActivationStore
from pocketvlm.calibration.walk.moments import CrossMoment, SecondMoment
from pocketvlm.calibration.walk.shared_batches import SharedBatches
from pocketvlm.calibration.walk.steps import Drift, InputMoments
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.reference_graph.sublayers import Sublayer, SublayerRows
from pocketvlm.reference_graph.visual_schedule import DroppedRows
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.modules import cache_dense_weights

MomentT = TypeVar("MomentT", bound=CrossMoment)

__all__ = ["PairedActivations", "advance", "forms_in_place", "measure_moments"]


@dataclass(kw_only=True, eq=False)
class PairedActivations:
    """States between two layers, of the model as it is now and, beside it, of the float model."""

    now: ActivationStore
    ideal: ActivationStore | None

    def append(self, batch: Tensor) -> None:
        """Adds a batch that both share."""
        self.now.append(batch)
        if self.ideal is not None:
            self.ideal.append(batch)

    def copy(self) -> PairedActivations:
        """The same states in other stores."""
        return PairedActivations(
            now=self.now.copy(), ideal=None if self.ideal is None else self.ideal.copy()
        )

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replaces every batch."""
        for store in (self.now, self.ideal):
            for index, batch in enumerate(store or ()):
                cast("ActivationStore", store)[index] = function(batch)

    def drop(self, drops: Sequence[DroppedRows | None]) -> None:
        """Leaves rows out, by batch; of both models the same."""
        for store in (self.now, self.ideal):
            for index, drop in enumerate(drops):
                if store is not None and drop is not None:
                    store[index] = drop.of(store[index])

    def close(self) -> None:
        """Frees memory and disk."""
        self.now.close()
        if self.ideal is not None:
            self.ideal.close()


@contextmanager
def forms_in_place(checkpoint: Checkpoint, forms: Mapping[str, WeightForm]) -> Iterator[None]:
    """Puts other forms into layers for a while."""
    layers = {name: checkpoint.layer(name) for name in forms}
    present = {name: layer.form for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.form = forms[name]
        yield
    finally:
        for name, layer in layers.items():
            layer.form = present[name]


def advance(
    sublayer: Sublayer,
    hidden: ActivationStore,
    rows_of: Callable[[int], SublayerRows | None],
) -> None:
    """Replaces states before a sublayer by those after it."""
    with cache_dense_weights(sublayer.linears):
        for index in range(len(hidden)):
            hidden[index] = sublayer.run(hidden[index], rows_of(index))


@torch.no_grad()
def measure_moments(
    path: PairedActivations,
    batches: SharedBatches,
    inputs_of: Callable[[Tensor, int], Tensor],
    weights_of: Callable[[int], Tensor | None],
    block: int | None,
    *,
    width: int,
    ideal_inputs: ActivationStore | None = None,
) -> InputMoments:
    """Moments of a layer's inputs, over the batches of all ranks.

    Args:
        path: States before the sublayer, of this rank's batches.
        batches: Which samples a batch holds.
        inputs_of: From a batch of states and its index to the layer's input.
        weights_of: Weights of a batch's tokens; `None` for all alike.
        block: Width of diagonal blocks; `None` for the whole matrix.
        width: Channels of the input.
        ideal_inputs: The float model's inputs, where `inputs_of` would need its weights.
    """

    def moment(kind: type[MomentT]) -> MomentT:
        return kind(width, block=block, device=path.now.device)

    found = {side: moment(SecondMoment) for side in batches.sides}
    drifts: dict[bool, Drift] = {}
    if path.ideal is not None:
        for side in batches.sides:
            drifts[side] = Drift(cross=moment(CrossMoment), own=moment(SecondMoment))
    for index, batch in enumerate(batches.own):
        if batch is None:
            continue
        inputs, weights = inputs_of(path.now[index], index), weights_of(index)
        found[batch.held_out].add(inputs, weights)
        if path.ideal is None:
            continue
        ideal = inputs_of(path.ideal[index], index) if ideal_inputs is None else ideal_inputs[index]
        difference = ideal - inputs
        drifts[batch.held_out].cross.add_pairs(difference, inputs, weights)
        drifts[batch.held_out].own.add(difference, weights)
    for side in batches.sides:
        found[side].join(batches.ranks)
        if path.ideal is not None:
            drifts[side].cross.join(batches.ranks)
            drifts[side].own.join(batches.ranks)
    return InputMoments(
        calibration=found[False],
        held_out=found.get(True),
        drift=drifts.get(False),
        held_out_drift=drifts.get(True),
    )
