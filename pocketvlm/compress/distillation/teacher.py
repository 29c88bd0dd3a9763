"""What the float model says of every calibration sample, computed once beforehand.

Stored are the states before the head instead of log-probabilities: the head makes one of the
other, and a state is a vocabulary's width smaller. So nothing of the teacher outlives this but its
head, and training holds one model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import torch
from torch import Tensor

from pocketvlm.calibration.data.prompts import Prompt
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.calibration.walk.activations import ActivationStore
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.distillation.answers import answer_states, make_batch, ordered_batches
from pocketvlm.errors import CalibrationError, RecipeError
from pocketvlm.reference_graph.forward import encode_images
from pocketvlm.weights.modules import FormLinear, cache_dense_weights

__all__ = ["TeacherTargets", "record_targets"]

_BATCH = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherTargets:
    """Targets of every sample.

    Attributes:
        states: What the teacher's head reads at a sample's answer, [tokens, width].
        visual: A sample's visual tokens [k, width]; empty where they cannot be compared.
        places: Where in both stores a sample's targets lie.
        head: The teacher's head.
        compares_states: Whether the student's states lie in the same coordinates.
        compares_visual: Whether the student's visual tokens do, and are as many.
        reasons: Why something is not compared.
    """

    states: ActivationStore
    visual: ActivationStore
    places: Mapping[int, int]
    head: FormLinear
    compares_states: bool
    compares_visual: bool
    reasons: tuple[str, ...]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.states.close()
        self.visual.close()

    def states_of(self, samples: Sequence[int]) -> Tensor:
        """States of several samples, one sample's tokens after another's, [tokens, width]."""
        return torch.cat([self.states[self.places[index]] for index in samples])

    def visual_of(self, samples: Sequence[int]) -> Tensor:
        """Visual tokens of several samples, tile after tile, [tiles, k, width]."""
        return torch.cat([self.visual[self.places[index]] for index in samples])


@torch.no_grad()
def record_targets(
    teacher: Checkpoint,
    student: Checkpoint,
    prompts: Sequence[Prompt],
    samples: CalibrationSet,
    *,
    spill_folder: Path | None,
    on_step: Callable[[int, int], None],
) -> TeacherTargets:
    """Runs the teacher on every sample.

    Args:
        teacher: The float model, which is moved to where the student computes.
        student: The model that will learn, to see what of the two can be compared.
        prompts: The samples as the student's processor encodes them.
        samples: The samples.
        spill_folder: Where targets go that do not fit into memory.
        on_step: Told how many samples are done, and of how many.

    Raises:
        RecipeError: The two models differ in family, vocabulary or placeholders.
        CalibrationError: A sample cannot be used, or the teacher's states are not finite.
    """
    _check_same_language(teacher, student)
    compares_states, compares_visual, reasons = _comparable(teacher, student)
    device = student.device
    teacher.move(device)
    states = ActivationStore(spill_folder, device=device)
    visual = ActivationStore(spill_folder, device=device)
    places: dict[int, int] = {}
    with cache_dense_weights(teacher.model):
        for chosen in ordered_batches(prompts, range(len(prompts)), _BATCH):
            batch = make_batch(prompts, chosen)
            # As the student cuts them, which may be into fewer tiles.
            seen = encode_images(teacher, samples.pixels(student.processor, chosen))
            found = answer_states(teacher, batch, seen)
            if not bool(torch.isfinite(found).all()):
                raise CalibrationError(
                    f"{prompts[chosen[0]].where}: the float model's states are not finite on its "
                    "batch; there is nothing to learn from"
                )
            tiles = seen.embeds.split([prompts[index].tiles for index in chosen])
            for row, index in enumerate(chosen):
                places[index] = len(places)
                states.append(found[batch.rows == row])
                visual.append(tiles[row].clone() if compares_visual else torch.zeros(0))
            on_step(len(places), len(prompts))
    head = cast("FormLinear", teacher.layer(teacher.spec.decoder.head))
    return TeacherTargets(
        states=states,
        visual=visual,
        places=places,
        head=head,
        compares_states=compares_states,
        compares_visual=compares_visual,
        reasons=reasons,
    )


def _check_same_language(teacher: Checkpoint, student: Checkpoint) -> None:
    for what, theirs, own in (
        ("family", teacher.spec.family, student.spec.family),
        ("vocabulary", teacher.spec.decoder.vocab_size, student.spec.decoder.vocab_size),
        ("image placeholder", teacher.spec.image_token_id, student.spec.image_token_id),
        ("number of placeholders", teacher.spec.visual_tokens, student.spec.visual_tokens),
    ):
        if theirs != own:
            raise RecipeError(
                f"distill: the source model {teacher.source.name} has {what} {theirs}, the model "
                f"that would learn from it {own}; a teacher is the model that the run started from"
            )


def _comparable(teacher: Checkpoint, student: Checkpoint) -> tuple[bool, bool, tuple[str, ...]]:
    """Whether states and visual tokens can be compared, and why not."""
    width, own = teacher.spec.decoder.hidden_size, student.spec.decoder.hidden_size
    if width != own:
        return False, False, (f"features are not compared: {own} channels wide, not {width}",)
    rows = torch.arange(0, student.spec.decoder.vocab_size, 7)
    tables = (
        model.form(model.spec.decoder.embedding).take_rows(rows) for model in (teacher, student)
    )
    if not torch.equal(*tables):
        reason = "features are not compared: the two models' tables are not the same coordinates"
        return False, False, (reason,)
    if student.reducer is not None or teacher.reducer is not None:
        return True, False, ("visual tokens are not compared: they are reduced",)
    return True, True, ()
