"""The model as a path of blocks, any of which may be left out: what depth pruning measures along.

Samples run batch by batch. A batch's hidden state before a block is enough to try the model
without that block, so that only what comes after it is run again, and nothing is stored.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.data.decoder_inputs import embed_samples
from pocketvlm.calibration.data.prompts import BATCH_TOKENS, Prompt, batch_prompts
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.depth.blocks import Block, all_blocks
from pocketvlm.errors import CalibrationError
from pocketvlm.reference_graph.decoder_rows import DecoderRows
from pocketvlm.reference_graph.forward import (
    VisualTokens,
    embed_patches,
    project,
    tower_features,
)
from pocketvlm.reference_graph.sublayers import (
    decoder_sublayers,
    run_sublayers,
    tower_sublayers,
)

__all__ = ["BlockPath", "PathState"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PathState:
    """One batch between two blocks.

    Attributes:
        rows: Indices of its samples.
        hidden: float32 [rows, tokens, width].
        decoder_rows: What attention takes beside the hidden state; `None` inside the tower.
        is_visual: bool [rows, tokens]: which columns came from an image; `None` inside the tower.
    """

    rows: tuple[int, ...]
    hidden: Tensor
    decoder_rows: DecoderRows | None = None
    is_visual: Tensor | None = None


class BlockPath:
    """Runs samples through the blocks of a checkpoint that keeps all its visual tokens.

    Args:
        checkpoint: The model.
        samples: Pictures with questions and answers.
        prompts: The same as token ids.

    Attributes:
        blocks: Every block that is run, in order of execution.
    """

    def __init__(
        self, checkpoint: Checkpoint, samples: CalibrationSet, prompts: Sequence[Prompt]
    ) -> None:
        self._checkpoint = checkpoint
        self._samples = samples
        self._prompts = prompts
        self.blocks = all_blocks(checkpoint.spec)

    def batches(self, rows: range) -> tuple[tuple[int, ...], ...]:
        """Which of some samples run together: those of one length, in their order."""
        prompts = self._prompts[rows.start : rows.stop]
        return tuple(
            tuple(rows.start + index for index in batch.samples)
            for batch in batch_prompts(prompts, len(prompts), BATCH_TOKENS)
        )

    @torch.no_grad()
    def enter(self, rows: tuple[int, ...]) -> PathState:
        """A batch before the tower's first block.

        Raises:
            CalibrationError: A picture cannot be used.
        """
        model, spec = self._checkpoint.model, self._checkpoint.spec
        pixels = self._samples.pixels(self._checkpoint.processor, rows)
        return PathState(rows=rows, hidden=embed_patches(model, spec, pixels))

    @torch.no_grad()
    def reach(self, block: Block, state: PathState) -> PathState:
        """The state as the block reads it: crosses from the tower to the decoder where needed."""
        if block.stack == "tower" or state.decoder_rows is not None:
            return state
        model, spec = self._checkpoint.model, self._checkpoint.spec
        visual = project(model, spec, tower_features(model, spec, state.hidden))
        indices = torch.arange(visual.shape[1]).expand(visual.shape[0], -1)
        tokens = VisualTokens(embeds=visual, indices=indices)
        inputs = embed_samples(self._checkpoint, self._prompts, state.rows, tokens)
        return PathState(
            rows=state.rows,
            hidden=inputs.embeds,
            decoder_rows=inputs.rows(spec.decoder),
            is_visual=inputs.is_visual,
        )

    @torch.no_grad()
    def run(self, block: Block, state: PathState) -> PathState:
        """The state after a block, from what it reads."""
        model, spec = self._checkpoint.model, self._checkpoint.spec
        sublayers_of = tower_sublayers if block.stack == "tower" else decoder_sublayers
        sublayers = sublayers_of(model, spec, block.index)
        return replace(state, hidden=run_sublayers(sublayers, state.decoder_rows, state.hidden))

    def own(self, block: Block, state: PathState) -> Tensor:
        """The state at a block without the features of earlier blocks that it carries."""
        spec = self._checkpoint.spec
        stack = spec.tower if block.stack == "tower" else spec.decoder
        return state.hidden[..., : stack.hidden_size]

    @torch.no_grad()
    def losses(self, state: PathState) -> Tensor:
        """Mean cross-entropy of each sample's answer, float64 [rows], after the last block.

        The token that ends an answer counts as one of its tokens.

        Raises:
            CalibrationError: A sample has no answer, or its answer was cut off.
        """
        model, decoder = self._checkpoint.model, self._checkpoint.spec.decoder
        norm = model.get_submodule(decoder.norm)
        head = model.get_submodule(decoder.head)
        found = []
        for row, hidden in zip(state.rows, state.hidden, strict=True):
            prompt = self._prompts[row]
            if not prompt.has_answer:
                raise CalibrationError(
                    f"{prompt.where}: has no answer, or all of it was cut off; what a block is "
                    "worth is measured by the answers' loss, so every sample needs one"
                )
            logits = head(norm(hidden[prompt.predicting(hidden.shape[0])]))
            answer = torch.tensor(prompt.token_ids[prompt.answer_start : prompt.answer_end])
            found.append(functional.cross_entropy(logits.double(), answer))
        return torch.stack(found)

    def mean_loss(self, rows: range, removed: Collection[Block] = ()) -> float:
        """Mean over samples of their answers' losses, with some blocks left out.

        Raises:
            CalibrationError: A sample has no answer or cannot be used, or the loss is not finite.
        """
        total = 0.0
        for batch in self.batches(rows):
            state = self.enter(batch)
            for block in self.blocks:
                if block not in removed:
                    state = self.run(block, self.reach(block, state))
            total += float(self.losses(state).sum())
        if not math.isfinite(total):
            names = ", ".join(block.name(self._checkpoint.spec) for block in removed)
            raise CalibrationError(
                f"{self._samples.name}: the answers' loss is not finite"
                f"{f' without {names}' if names else ''}"
            )
        return total / len(rows)
