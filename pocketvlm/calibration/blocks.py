"""Walks a model layer by layer in order of execution, on calibration data.

Each step names the linears that share one input and can compute that input's second moment from
everything before it *as it is now*: whoever walks may replace the step's weights before going on,
and the next step then sees what the compressed prefix really produces (GPTQ's true-sequential
order). Visual-token reduction is applied where the checkpoint has one, so the decoder's statistics
are those of the sequence that the phone will run.

Only the hidden state between two half blocks is kept, of all samples, in an `ActivationStore`; a
layer's inputs are accumulated batch by batch and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pocketvlm.calibration.activations import ActivationStore
from pocketvlm.calibration.halves import HalfBlock, decoder_halves, tower_halves
from pocketvlm.calibration.modality import ModalityWeighting, TokenCounts, token_weights
from pocketvlm.calibration.prompts import (
    Prompt,
    PromptBatch,
    batch_images,
    batch_prompts,
    encode_samples,
)
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.calibration.statistics import SecondMoment
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.forward import (
    DecoderInputs,
    VisualTokens,
    embed_patches,
    embed_prompts,
    merge_patches,
    scoring_attention,
)
from pocketvlm.reduction import ReducerInputs
from pocketvlm.weights import cache_dense_weights

__all__ = ["BlockWalk", "InputMoments", "SharedInput"]

# Tokens that run through a half block at once: enough for full speed, little enough memory.
_BATCH_TOKENS = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class InputMoments:
    """Statistics of one input.

    Attributes:
        calibration: Over the samples that a method may fit.
        held_out: Over the samples that only judge it; `None` where all samples are fitted.
    """

    calibration: SecondMoment
    held_out: SecondMoment | None


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedInput:
    """One step of the walk.

    Attributes:
        names: Linears that read this input, in order of execution.
        moments: Computes the input's statistics from the model as it is now; its argument is the
            width of diagonal blocks, for inputs too wide for a full matrix. `None` for a table
            that is only looked up.
    """

    names: tuple[str, ...]
    moments: Callable[[int | None], InputMoments] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockWalk:
    """One pass over a checkpoint.

    Attributes:
        checkpoint: The model; its weights may be replaced between two steps.
        samples: The calibration set.
        weighting: How much visual tokens count in the decoder.
        held_out: Share of the samples, from the end, that only judge.
        tower_tokens: The tower's moments stop at so many tokens; all images run through it
            nevertheless.
        spill_folder: Where activations go that do not fit into memory.
    """

    checkpoint: Checkpoint
    samples: CalibrationSet
    weighting: ModalityWeighting = "uniform"
    held_out: float = 0.125
    tower_tokens: int = 32768
    spill_folder: Path | None = None

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """The samples as token ids."""
        return encode_samples(self.checkpoint.processor, self.samples)

    @cached_property
    def counts(self) -> TokenCounts:
        """Tokens that enter the decoder, after any reduction."""
        spec, reducer = self.checkpoint.spec, self.checkpoint.reducer
        kept = spec.visual_tokens if reducer is None else reducer.keep
        total = sum(len(prompt.token_ids) for prompt in self.prompts)
        return TokenCounts(
            visual=kept * len(self.prompts), text=total - spec.visual_tokens * len(self.prompts)
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
        per_image = _tower_tokens(self.checkpoint)
        return min(self.first_held_out, max(1, self.tower_tokens // per_image))

    def __iter__(self) -> Iterator[SharedInput]:
        """Yields every step in order of execution.

        Raises:
            CalibrationError: A picture cannot be used, or an input is not finite.
        """
        spec = self.checkpoint.spec
        # Encoded first: a bad sample should fail before an hour of work, not after it.
        prompts = self.prompts
        per_image = _tower_tokens(self.checkpoint)
        batches = batch_images(
            len(self.samples),
            self.first_held_out,
            max(1, _BATCH_TOKENS // per_image),
            fitted=self.tower_samples,
            judging=max(1, math.ceil(self.tower_samples * self.held_out)),
        )
        visual = yield from self._tower(batches)
        if not spec.decoder.tied_head:
            yield SharedInput(names=(spec.decoder.embedding,), moments=None)
        yield from self._decoder(prompts, visual)

    def _tower(self, batches: Sequence[PromptBatch]) -> Generator[SharedInput, None, VisualTokens]:
        checkpoint, spec = self.checkpoint, self.checkpoint.spec
        with ActivationStore(self.spill_folder) as hidden:
            entering: ActivationStore | None = None
            for batch in batches:
                hidden.append(self._embed(batch))
            used = [batch if batch.in_tower_moments else None for batch in batches]
            for block in range(spec.tower.feature_block + 1):
                if block == spec.tower.feature_block and checkpoint.reducer is not None:
                    entering = hidden.copy()
                for half in tower_halves(checkpoint.model, spec, block):
                    arguments = {"attention_mask": None} if half.kind == "attention" else {}
                    yield from _half_steps(half, hidden, used, lambda _: None, [arguments])
                    _advance(half, hidden, [arguments])
            with ActivationStore(self.spill_folder) as features:
                indices = self._keep_features(hidden, entering, features)
                if entering is not None:
                    entering.close()
                return (yield from self._project(batches, features, indices))

    def _embed(self, batch: PromptBatch) -> Tensor:
        images = [self.samples.samples[index].open_image() for index in batch.samples]
        with torch.no_grad():
            pixels = self.checkpoint.processor.pixels(images)
            return embed_patches(self.checkpoint.model, self.checkpoint.spec, pixels)

    @torch.no_grad()
    def _keep_features(
        self, hidden: ActivationStore, entering: ActivationStore | None, features: ActivationStore
    ) -> list[Tensor]:
        """Fills `features` with what enters the projector; returns which tokens were kept."""
        checkpoint, spec = self.checkpoint, self.checkpoint.spec
        model, reducer, factor = checkpoint.model, checkpoint.reducer, spec.projector.merge_factor
        kept_indices = []
        for number, batch in enumerate(hidden):
            states = batch
            if spec.tower.has_post_norm:
                states = model.get_submodule(f"{spec.tower.prefix}.post_layernorm")(states)
            if spec.tower.has_cls:
                states = states[:, 1:]
            merged = merge_patches(states, factor)
            if reducer is None or entering is None:
                features.append(merged.contiguous())
                kept_indices.append(torch.arange(merged.shape[1]).expand(merged.shape[0], -1))
                continue
            queries, keys = scoring_attention(model, spec, entering[number])
            kept, indices = reducer(
                ReducerInputs(
                    features=merged,
                    queries=queries,
                    keys=keys,
                    has_cls=spec.tower.has_cls,
                    merge_factor=factor,
                )
            )
            features.append(kept.contiguous())
            kept_indices.append(indices)
        return kept_indices

    def _project(
        self,
        batches: Sequence[PromptBatch],
        features: ActivationStore,
        indices: Sequence[Tensor],
    ) -> Generator[SharedInput, None, VisualTokens]:
        from transformers.activations import ACT2FN

        model, projector = self.checkpoint.model, self.checkpoint.spec.projector
        used: list[PromptBatch | None] = list(batches)
        states = features
        for number, name in enumerate(projector.linears):
            if number:
                activation = ACT2FN[projector.activation]
                for index, batch in enumerate(states):
                    states[index] = activation(batch)
            yield SharedInput(names=(name,), moments=_moments_of(states, used, lambda x, _: x))
            projected = ActivationStore(self.spill_folder)
            linear = model.get_submodule(name)
            with torch.no_grad(), cache_dense_weights(linear):
                for batch in states:
                    projected.append(linear(batch))
            states.close()
            states = projected
        with states:
            return VisualTokens(embeds=torch.cat(list(states)), indices=torch.cat(list(indices)))

    def _decoder(self, prompts: Sequence[Prompt], visual: VisualTokens) -> Iterator[SharedInput]:
        checkpoint, spec = self.checkpoint, self.checkpoint.spec
        batches = batch_prompts(prompts, self.first_held_out, _BATCH_TOKENS)
        used: list[PromptBatch | None] = list(batches)
        rotary = cast("Any", checkpoint.model.get_submodule(spec.decoder.prefix)).rotary_emb
        is_visual: list[Tensor] = []
        attention: list[dict[str, Any]] = []
        with ActivationStore(self.spill_folder) as hidden:
            for batch in batches:
                inputs = self._splice(batch, prompts, visual)
                hidden.append(inputs.embeds)
                is_visual.append(inputs.is_visual)
                angles = rotary(inputs.embeds, position_ids=inputs.positions)
                # No mask: causal attention within the sequence, whatever gaps its positions have.
                attention.append({"attention_mask": None, "position_embeddings": angles})
            weights = [token_weights(self.weighting, self.counts, flags) for flags in is_visual]
            for block in range(spec.decoder.depth):
                for half in decoder_halves(checkpoint.model, spec, block):
                    arguments = attention if half.kind == "attention" else [{}]
                    yield from _half_steps(half, hidden, used, weights.__getitem__, arguments)
                    _advance(half, hidden, arguments)
            norm = checkpoint.model.get_submodule(f"{spec.decoder.prefix}.norm")
            decoder = spec.decoder
            yield SharedInput(
                names=(decoder.embedding if decoder.tied_head else decoder.head,),
                moments=_moments_of(
                    hidden,
                    used,
                    lambda states, _: norm(states),
                    # No logits are ever read at the image's tokens.
                    lambda index: (~is_visual[index]).to(torch.float32),
                ),
            )

    @torch.no_grad()
    def _splice(
        self, batch: PromptBatch, prompts: Sequence[Prompt], visual: VisualTokens
    ) -> DecoderInputs:
        rows = list(batch.samples)
        token_ids = torch.tensor([prompts[index].token_ids for index in rows])
        tokens = VisualTokens(embeds=visual.embeds[rows], indices=visual.indices[rows])
        return embed_prompts(self.checkpoint, token_ids, tokens)


def _tower_tokens(checkpoint: Checkpoint) -> int:
    tower = checkpoint.spec.tower
    return tower.patches_per_side**2 + int(tower.has_cls)


def _half_steps(
    half: HalfBlock,
    hidden: ActivationStore,
    batches: Sequence[PromptBatch | None],
    weights_of: Callable[[int], Tensor | None],
    arguments: Sequence[Mapping[str, Any]],
) -> Iterator[SharedInput]:
    """The two steps of a half block, from what enters it."""
    yield SharedInput(
        names=half.first,
        moments=_moments_of(
            hidden, batches, lambda states, _: half.inputs_of_first(states), weights_of
        ),
    )

    def inputs_of_last(states: Tensor, index: int) -> Tensor:
        return half.inputs_of_last(states, arguments[index % len(arguments)])

    def moments(block: int | None) -> InputMoments:
        with cache_dense_weights(half.body):
            return _moments_of(hidden, batches, inputs_of_last, weights_of)(block)

    yield SharedInput(names=(half.last,), moments=moments)


def _advance(
    half: HalfBlock, hidden: ActivationStore, arguments: Sequence[Mapping[str, Any]]
) -> None:
    with cache_dense_weights(half.body):
        for index in range(len(hidden)):
            hidden[index] = half.run(hidden[index], arguments[index % len(arguments)])


def _moments_of(
    states: ActivationStore,
    batches: Sequence[PromptBatch | None],
    inputs_of: Callable[[Tensor, int], Tensor],
    weights_of: Callable[[int], Tensor | None] = lambda _: None,
) -> Callable[[int | None], InputMoments]:
    @torch.no_grad()
    def moments(block: int | None) -> InputMoments:
        found: dict[bool, SecondMoment] = {}
        for index, batch in enumerate(batches):
            if batch is None:
                continue
            inputs = inputs_of(states[index], index)
            if batch.held_out not in found:
                found[batch.held_out] = SecondMoment(inputs.shape[-1], block=block)
            found[batch.held_out].add(inputs, weights_of(index))
        return InputMoments(calibration=found[False], held_out=found.get(True))

    return moments
