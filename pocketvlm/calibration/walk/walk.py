"""Walks a model layer by layer in order of execution, on calibration data.

Each step names the linears that share one input and can compute that input's second moment from
everything before it *as it is now*: the caller may replace the step's weights before it continues,
and the next step then sees what the compressed prefix really produces (GPTQ's true-sequential
order). Visual-token reduction is applied where the checkpoint has one, so the decoder's statistics
are those of the sequence that the phone will run.

Only the hidden state between two sublayers is kept, of all samples, in an `ActivationStore`; a
layer's inputs are accumulated batch by batch and dropped. Where several processes share a run, each
keeps the states of its own batches; visual tokens are exchanged before the decoder, and sums over
batches are added up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from pocketvlm.calibration.data.modality import ModalityWeighting, TokenCounts
from pocketvlm.calibration.data.prompts import (
    BATCH_TOKENS,
    Prompt,
    PromptBatch,
    batch_images,
    batch_prompts,
    encode_samples,
)
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.calibration.walk.context import WalkContext
from pocketvlm.calibration.walk.decoder import decoder_weights, walk_decoder
from pocketvlm.calibration.walk.steps import LinearGroup, Step
from pocketvlm.calibration.walk.tower import walk_tower
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import ALONE, Ranks
from pocketvlm.errors import CalibrationError

__all__ = ["BlockWalk"]


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockWalk:
    """One pass over a checkpoint.

    Attributes:
        checkpoint: The model; its weights may be replaced between two steps.
        samples: The calibration set.
        weighting: How much visual tokens count in the decoder.
        held_out: Share of the samples, from the end, that only judge.
        tower_tokens: The tower's moments stop at that many tokens; all images run through it
            nevertheless.
        spill_folder: Where activations go that do not fit into memory.
        carry_float: Whether the float model runs along, so that moments know the drift and
            finished sublayers their targets. Costs a second forward pass and the originals of one
            sublayer.
        ranks: The processes that share the samples.
    """

    checkpoint: Checkpoint
    samples: CalibrationSet
    weighting: ModalityWeighting = "uniform"
    held_out: float = 0.125
    tower_tokens: int = 32768
    spill_folder: Path | None = None
    carry_float: bool = False
    ranks: Ranks = ALONE

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """The samples as token ids."""
        return encode_samples(self.checkpoint.processor, self.samples)

    @cached_property
    def counts(self) -> TokenCounts:
        """Tokens that enter the decoder, at most, after any reduction."""
        spec, kept = self.checkpoint.spec, self.checkpoint.visual_tokens
        total = sum(len(prompt.token_ids) for prompt in self.prompts)
        grids = [prompt.grid for prompt in self.prompts]
        return TokenCounts(
            visual=sum(grid.most_rows(spec.visual_tokens, kept) for grid in grids),
            text=total - sum(grid.placeholders(spec.visual_tokens) for grid in grids),
        )

    @property
    def first_held_out(self) -> int:
        """Index of the first sample that only judges."""
        count = len(self.samples)
        # With a single sample there is nothing to hold out.
        held = min(math.ceil(count * self.held_out), count - 1)
        return count - held

    @property
    def tower_samples(self) -> int:
        """Samples whose images enter the tower's Hessians."""
        per_tile = self.checkpoint.spec.tower.tokens
        tokens = accumulate(prompt.tiles * per_tile for prompt in self.prompts)
        enough = sum(total <= self.tower_tokens for total in tokens)
        return min(self.first_held_out, max(1, enough))

    def __iter__(self) -> Iterator[Step]:
        """Yields every step in order of execution.

        Raises:
            CalibrationError: A picture cannot be used, an input is not finite, or there are fewer
                batches than processes.
        """
        spec = self.checkpoint.spec
        # Encoded first: a bad sample should fail before an hour of work, not after it.
        prompts = self.prompts
        per_image = spec.tower.tokens
        batches = batch_images(
            len(self.samples),
            self.first_held_out,
            max(1, BATCH_TOKENS // per_image),
            fitted=self.tower_samples,
            judging=max(1, math.ceil(self.tower_samples * self.held_out)),
        )
        self._require_work_for_all(len(batches), len(self._decoder_batches))
        ctx = WalkContext(
            checkpoint=self.checkpoint,
            spill_folder=self.spill_folder,
            carry_float=self.carry_float,
            ranks=self.ranks,
        )
        visual, ideal = yield from walk_tower(ctx, self.samples, batches)
        if not spec.decoder.tied_head:
            yield LinearGroup(names=(spec.decoder.embedding,), moments=None)
        every = self._decoder_batches
        own = self.ranks.own(every)
        weights_of = decoder_weights(ctx, self.weighting, self.counts, prompts, own, visual)
        yield from walk_decoder(ctx, prompts, every, (visual, ideal), weights_of)

    @cached_property
    def _decoder_batches(self) -> tuple[PromptBatch, ...]:
        return batch_prompts(self.prompts, self.first_held_out, BATCH_TOKENS)

    def _require_work_for_all(self, *batches: int) -> None:
        most = min(batches)
        if self.ranks.count > most:
            raise CalibrationError(
                f"{self.samples.name}: {len(self.samples)} samples make {most} batches, which "
                f"{self.ranks.count} processes cannot share; start at most {most}, or give more "
                "samples"
            )
