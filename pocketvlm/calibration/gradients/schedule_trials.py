"""A model's answers under one schedule of visual rows after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from pocketvlm.bundle import VisualSchedule
from pocketvlm.calibration.data.prompts import BATCH_TOKENS, Prompt
from pocketvlm.calibration.gradients.backward import enter_samples
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import CalibrationError
from pocketvlm.reference_graph.sublayers import decoder_sublayers
from pocketvlm.reference_graph.visual_schedule import BlockRows, RowsLeft
from pocketvlm.weights.modules import cache_dense_weights

__all__ = ["GivenAnswers", "ScheduleTrials"]


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenAnswers:
    """What a model says of every sample's answer.

    Attributes:
        losses: float64 [samples]: mean cross-entropy of the answer's tokens, its end included.
        is_right: bool [samples]: whether each token of the answer is the likeliest one, so that
            greedy generation would write the answer.
    """

    losses: Tensor
    is_right: Tensor

    @property
    def right(self) -> int:
        """Right answers."""
        return int(self.is_right.sum())

    @property
    def loss(self) -> float:
        """Mean over samples, in nats."""
        return float(self.losses.mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    samples: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    hidden: Tensor
    left: RowsLeft


class ScheduleTrials:
    """Runs calibration samples through the decoder under one schedule or another.

    Hidden states before a block are kept, of all samples: a search that settles the first layers
    first runs only the rest (`settle`). Costs these states, and the decoder's weights in float32.

    Args:
        checkpoint: The model; no row is dropped inside its decoder.
        samples: Pictures with questions and answers.

    Attributes:
        plain: The answers without a schedule.
        prompt_rows: Rows of text and visual rows of every sample's prompt, its answer left out.

    Raises:
        CalibrationError: A sample cannot be used or has no answer, or an output is not finite.
    """

    @torch.no_grad()
    def __init__(self, checkpoint: Checkpoint, samples: CalibrationSet) -> None:
        self._checkpoint = checkpoint
        spec = checkpoint.spec
        self._blocks = [
            decoder_sublayers(checkpoint.model, spec, block) for block in range(spec.decoder.depth)
        ]
        self._at = 0
        self._batches: list[_Batch] = []
        rows: dict[int, tuple[int, int]] = {}
        entered = enter_samples(
            checkpoint,
            samples,
            batch_tokens=BATCH_TOKENS,
            reason="schedules are judged by answers",
        )
        for batch in entered:
            inputs = batch.inputs
            left = RowsLeft.of(batch.rows, inputs.is_visual, inputs.reader)
            self._batches.append(
                _Batch(
                    samples=batch.samples, prompts=batch.prompts, hidden=inputs.embeds, left=left
                )
            )
            for index, prompt, count in zip(
                batch.samples, batch.prompts, left.entered, strict=True
            ):
                answered = len(prompt.token_ids) - prompt.answer_start
                rows[index] = (inputs.embeds.shape[1] - answered - count, count)
        self.prompt_rows = tuple(rows[index] for index in range(len(rows)))
        self.plain = self.answers(None)
        if not bool(torch.isfinite(self.plain.losses).all()):
            raise CalibrationError("the model's outputs are not finite on the calibration data")

    @torch.no_grad()
    def answers(self, schedule: VisualSchedule | None) -> GivenAnswers:
        """The answers under a schedule, among whose drops are those that are settled."""
        found = {
            index: judged
            for batch in self._run(schedule, len(self._blocks))
            for index, judged in self._judge(batch)
        }
        losses, is_right = zip(*(found[index] for index in range(len(found))), strict=True)
        return GivenAnswers(losses=torch.stack(losses), is_right=torch.stack(is_right))

    @torch.no_grad()
    def settle(self, schedule: VisualSchedule | None, block: int) -> None:
        """Keeps hidden states before a block, under what later schedules agree on up to there.

        Raises:
            ValueError: Those before a later block are kept already.
        """
        if block < self._at:
            raise ValueError(f"what comes before block {self._at} is settled already")
        self._batches = list(self._run(schedule, block))
        self._at = block

    def _run(self, schedule: VisualSchedule | None, end: int) -> list[_Batch]:
        """All batches as they enter a block."""
        model, decoder = self._checkpoint.model, self._checkpoint.spec.decoder
        checkpoint = replace(self._checkpoint, visual_schedule=schedule)
        batches = list(self._batches)
        with cache_dense_weights(model.get_submodule(decoder.prefix)):
            for block in range(self._at, end):
                for number, batch in enumerate(batches):
                    rows = BlockRows.of(checkpoint, block, batch.hidden, batch.left)
                    hidden = rows.run(self._blocks[block], batch.hidden)
                    batches[number] = replace(batch, hidden=hidden, left=rows.ffn)
        return batches

    def _judge(self, batch: _Batch) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Loss of the answer and whether it is right, of each sample by its number."""
        model, decoder = self._checkpoint.model, self._checkpoint.spec.decoder
        norm, head = model.get_submodule(decoder.norm), model.get_submodule(decoder.head)
        for index, prompt, states in zip(batch.samples, batch.prompts, batch.hidden, strict=True):
            logits = head(norm(states[prompt.predicting(states.shape[0])])).double()
            answer = torch.tensor(prompt.token_ids[prompt.answer_start : prompt.answer_end])
            is_right = (logits.argmax(dim=-1) == answer).all()
            yield index, (functional.cross_entropy(logits, answer), is_right)
