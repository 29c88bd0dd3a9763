"""The steps of what turns features of the tower into visual tokens."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pocketvlm.calibration.walk.activations import join_batches
from pocketvlm.calibration.walk.context import WalkContext
from pocketvlm.calibration.walk.paired_activations import (
    PairedActivations,
    forms_in_place,
    measure_moments,
)
from pocketvlm.calibration.walk.shared_batches import SharedBatches
from pocketvlm.calibration.walk.steps import LinearGroup, Step
from pocketvlm.models.projector import ProjectorStep, run_steps, step_linears
from pocketvlm.reference_graph.forward import VisualTokens
from pocketvlm.reference_graph.torch_ops import TorchOps
from pocketvlm.weights.modules import cache_dense_weights

__all__ = ["PairedTokens", "walk_projector"]

PairedTokens = tuple[VisualTokens, VisualTokens | None]
"""Visual tokens of the model as it is now and, where it runs along, of the float model."""


def walk_projector(
    ctx: WalkContext,
    batches: SharedBatches,
    features: PairedActivations,
    indices: Sequence[Tensor],
    steps: Sequence[ProjectorStep],
) -> Generator[Step, None, PairedTokens]:
    """Yields the steps of a projector; returns the tokens of all samples.

    Args:
        ctx: The walk.
        batches: Which samples a batch holds.
        features: What enters; closed in the end.
        indices: Which of a tile's tokens these are, batch by batch.
        steps: What is done with them.
    """
    checkpoint = ctx.checkpoint
    ops = TorchOps(checkpoint.model, checkpoint.spec)
    path = features
    for step in steps:
        names, run = step_linears(step), partial(run_steps, ops, (step,))
        if not names:
            with torch.no_grad():
                path.apply(run)
            continue
        originals = ctx.originals(names)
        yield LinearGroup(
            names=names,
            moments=partial(
                measure_moments,
                path,
                batches,
                lambda states, _: states,
                lambda _: None,
                width=ctx.width(*names),
            ),
        )
        layers = nn.ModuleList(checkpoint.model.get_submodule(name) for name in names)
        with torch.no_grad():
            projected = ctx.paired()
            with cache_dense_weights(layers):
                projected.now.extend(run(batch) for batch in path.now)
            if path.ideal is not None and projected.ideal is not None:
                with forms_in_place(checkpoint, originals), cache_dense_weights(layers):
                    projected.ideal.extend(run(batch) for batch in path.ideal)
        path.close()
        path = projected
    chosen = torch.cat(list(batches.exchange(indices)))
    embeds = join_batches(batches.exchange(path.now), ctx.spill_folder)
    visual, ideal = VisualTokens(embeds=embeds, indices=chosen), None
    if path.ideal is not None:
        embeds = join_batches(batches.exchange(path.ideal), ctx.spill_folder)
        ideal = VisualTokens(embeds=embeds, indices=chosen)
    path.close()
    return visual, ideal
