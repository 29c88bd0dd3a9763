"""What is minimised: logits, answers and features of a batch against the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketvlm.calibration.data.prompts import Prompt
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.calibration.walk.activations import ActivationStore
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.distillation.answers import (
    AnswerBatch,
    answer_states,
    make_batch,
    ordered_batches,
)
from pocketvlm.compress.distillation.losses import (
    answer_cross_entropy,
    feature_distance,
    logit_divergence,
)
from pocketvlm.compress.distillation.teacher import TeacherTargets
from pocketvlm.reference_graph.forward import VisualTokens, encode_images

__all__ = ["Figures", "LossWeights", "Objective", "VisualSource", "fresh_visual", "stored_visual"]

_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """How the parts of the loss are mixed.

    Attributes:
        temperature: Of both models' logits.
        answers: Share of the answers' own cross-entropy; the rest is the teacher's divergence.
        features: Weight of the features' relative squared distance.
    """

    temperature: float
    answers: float
    features: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Means over samples, in nats where not said otherwise.

    Attributes:
        loss: What is minimised.
        divergence: KL(teacher || student) at temperature 1.
        cross_entropy: Of the answers' tokens.
        state_distance: Relative squared distance of the states that the head reads, or `None`.
        visual_distance: The same of visual tokens.
        agreement: Share of the answers' tokens of which both models' first choice is the same.
    """

    loss: float
    divergence: float
    cross_entropy: float
    state_distance: float | None
    visual_distance: float | None
    agreement: float


VisualSource = Callable[[Sequence[int]], VisualTokens]
"""The student's visual tokens of some samples, in order."""


def fresh_visual(checkpoint: Checkpoint, samples: CalibrationSet) -> VisualSource:
    """Runs the tower; what a student needs whose tower or projector is trained."""

    def look(chosen: Sequence[int]) -> VisualTokens:
        return encode_images(checkpoint, samples.pixels(checkpoint.processor, chosen))

    return look


@torch.no_grad()
def stored_visual(
    look: VisualSource,
    prompts: Sequence[Prompt],
    store: ActivationStore,
    on_step: Callable[[int, int], None],
) -> VisualSource:
    """Runs the tower once over all samples; right where nothing before the decoder is trained.

    Args:
        look: Runs the tower.
        prompts: All samples as token ids.
        store: An empty store, which the caller closes.
        on_step: Told how many samples are done, and of how many.
    """
    indices: list[Tensor] = []
    count = len(prompts)
    for start in range(0, count, _BATCH):
        chosen = range(start, min(start + _BATCH, count))
        seen = look(chosen)
        tiles = [prompts[index].tiles for index in chosen]
        store.extend(embeds.clone() for embeds in seen.embeds.split(tiles))
        indices.extend(seen.indices.split(tiles))
        on_step(chosen.stop, count)

    def recall(chosen: Sequence[int]) -> VisualTokens:
        return VisualTokens(
            embeds=torch.cat([store[index] for index in chosen]),
            indices=torch.cat([indices[index] for index in chosen]),
        )

    return recall


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """The loss of a student.

    Attributes:
        checkpoint: The student's model.
        prompts: All samples as token ids.
        visual: Its visual tokens.
        targets: What the teacher says.
        weights: How the parts are mixed.
    """

    checkpoint: Checkpoint
    prompts: Sequence[Prompt]
    visual: VisualSource
    targets: TeacherTargets
    weights: LossWeights

    def loss(self, samples: Sequence[int]) -> Tensor:
        """The samples' losses, summed; autograd may record it."""
        return self._parts(make_batch(self.prompts, samples)).loss

    @torch.no_grad()
    def figures(self, samples: Sequence[int]) -> Figures:
        """Mean figures over some samples, with the weights that the layers have now."""
        parts = [
            self._parts(make_batch(self.prompts, chosen))
            for chosen in ordered_batches(self.prompts, samples, _BATCH)
        ]

        def mean(values: Sequence[Tensor]) -> float:
            return sum(float(value) for value in values) / len(samples)

        def mean_if_known(values: Sequence[Tensor | None]) -> float | None:
            known = [value for value in values if value is not None]
            return mean(known) if known else None

        return Figures(
            loss=mean([part.loss for part in parts]),
            divergence=mean([part.divergence for part in parts]),
            cross_entropy=mean([part.cross_entropy for part in parts]),
            state_distance=mean_if_known([part.states for part in parts]),
            visual_distance=mean_if_known([part.visual for part in parts]),
            agreement=mean([part.agreement for part in parts]),
        )

    def _parts(self, batch: AnswerBatch) -> _Parts:
        weights, targets = self.weights, self.targets
        seen = self.visual(batch.samples)
        found = answer_states(self.checkpoint, batch, seen)
        head = self.checkpoint.layer(self.checkpoint.spec.decoder.head)
        logits = head(found)
        shares, labels = batch.shares.to(logits.device), batch.labels.to(logits.device)
        wanted = targets.states_of(batch.samples)
        with torch.no_grad():
            wanted_logits = targets.head(wanted)
            agreement = (wanted_logits.argmax(-1) == logits.argmax(-1)) * shares
        divergence = logit_divergence(wanted_logits, logits, shares, weights.temperature)
        answers = answer_cross_entropy(logits, labels, shares)
        loss = (1 - weights.answers) * divergence + weights.answers * answers
        states = visual = None
        if targets.compares_states:
            states = feature_distance(wanted, found, shares)
            loss = loss + weights.features * states
        if targets.compares_visual:
            tokens = targets.visual_of(batch.samples)
            own = tokens.shape[0] * tokens.shape[1] // len(batch.samples)
            share = tokens.new_full(tokens.shape[:2], 1 / own)
            visual = feature_distance(tokens, seen.embeds, share)
            loss = loss + weights.features * visual
        if weights.temperature != 1:
            with torch.no_grad():
                divergence = logit_divergence(wanted_logits, logits, shares)
        return _Parts(
            loss=loss,
            divergence=divergence,
            cross_entropy=answers,
            states=states,
            visual=visual,
            agreement=agreement.sum(),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Parts:
    """A batch's sums over its samples."""

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    states: Tensor | None
    visual: Tensor | None
    agreement: Tensor
