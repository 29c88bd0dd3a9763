"""Runs a model with one layer changed: of every forward pass only what comes after that layer.

The caller follows the model in order of execution; hidden states before the current
segment are kept, of all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from pocketvlm.calibration.data.decoder_inputs import embed_samples
from pocketvlm.calibration.data.prompts import (
    BATCH_TOKENS,
    Prompt,
    batch_prompts,
    encode_samples,
)
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import CalibrationError
from pocketvlm.graph.token_merging import TowerTokens
from pocketvlm.models.layers import LinearSpec
from pocketvlm.models.spec import ModelSpec
from pocketvlm.reference_graph.forward import (
    VisualTokens,
    embed_patches,
    encode_features,
    read_blocks,
)
from pocketvlm.reference_graph.sublayers import Sublayer, decoder_sublayers, tower_sublayers
from pocketvlm.reference_graph.tower_states import (
    TowerState,
    run_tower_attention,
    run_tower_block,
)
from pocketvlm.reference_graph.visual_schedule import BlockRows, RowsLeft
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.modules import cache_dense_weights

__all__ = ["PartialForward", "suffix_shares"]


def suffix_shares(spec: ModelSpec) -> dict[str, float]:
    """How much of a whole forward pass a run costs that begins at a layer, by its name.

    Counted in segments: sublayers of blocks, except that the tower's last block and the projector
    are one.
    """
    count = _splice(spec) + 2 * spec.decoder.depth + 2
    return {linear.name: 1 - _place(spec, linear) / count for linear in spec.linears()}


def _splice(spec: ModelSpec) -> int:
    """Place of the segment that puts visual tokens among those of the text."""
    return 2 * spec.tower.feature_block + 1


def _place(spec: ModelSpec, linear: LinearSpec) -> int:
    """Place of the first segment that uses a layer, in `PartialForward._build`."""
    splice = _splice(spec)
    sublayer = 1 if ".mlp." in linear.name else 0
    if linear.part == "tower" and linear.block is not None:
        return min(2 * linear.block + sublayer, splice - 1)
    if linear.part == "decoder" and linear.block is not None:
        return splice + 1 + 2 * linear.block + sublayer
    places = {"projector": splice - 1, "embedding": splice}
    return places.get(linear.part, splice + 1 + 2 * spec.decoder.depth)


@dataclass(frozen=True, kw_only=True, eq=False)
class _State:
    """One batch between two segments.

    Attributes:
        hidden: Hidden states, or visual tokens before the splice.
        tokens: What tokens stand for, in a tower that has merged some.
        entering: What entered the blocks of the tower that the token reduction reads.
        tapped: What left the blocks of the tower that add rows to the decoder.
        indices: Which visual tokens these are, before the splice.
        left: What these rows are, in the decoder.
    """

    hidden: Tensor
    tokens: TowerTokens | None = None
    entering: Mapping[int, TowerState] = field(default_factory=dict)
    tapped: tuple[Tensor, ...] = ()
    indices: Tensor | None = None
    left: RowsLeft | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Segment:
    """A stretch of the model.

    Attributes:
        modules: Where dense weights are kept while all batches run through.
        run: From a batch's number and its state to the next state.
    """

    modules: nn.Module | None
    run: Callable[[int, _State], _State]


class PartialForward:
    """The logits at the answers' tokens, of the model as it is or with one layer changed.

    Layers must be visited in order of execution; a tied table, which belongs to both ends, may be
    visited at any time. Costs the hidden states of all samples, twice.

    Args:
        checkpoint: The model; its weights must stay as they are while this lives.
        samples: Pictures with questions and answers.

    Attributes:
        prompts: Token ids of every sample.
        logits: float32 [answer tokens, vocabulary] of every sample, of the model as it is.

    Raises:
        CalibrationError: A sample cannot be used, or has no answer.
    """

    @torch.no_grad()
    def __init__(self, checkpoint: Checkpoint, samples: CalibrationSet) -> None:
        self._checkpoint = checkpoint
        self.prompts = encode_samples(checkpoint.processor, samples)
        for prompt in self.prompts:
            _require_answer(prompt)
        # The share of held-out samples is the caller's affair: here all are alike.
        batches = batch_prompts(self.prompts, len(self.prompts), BATCH_TOKENS)
        self._rows = tuple(batch.samples for batch in batches)
        spec = checkpoint.spec
        self._segments = self._build()
        self._places = {linear.name: _place(spec, linear) for linear in spec.linears()}
        self._splice = _splice(spec)
        self._at = 0
        self._states = [self._embed(rows, samples) for rows in self._rows]
        self._in_front_of_splice: list[_State] = []
        self.logits = self._logits(self._states, 0)

    @torch.no_grad()
    def logits_with(self, name: str, form: WeightForm) -> tuple[Tensor, ...]:
        """Like `logits`, with one layer in another form; its own is put back in any case.

        Raises:
            ValueError: A layer after this one was visited before.
        """
        present = self._checkpoint.form(name)
        place = self._places[name]
        states = self._states_in_front_of(place)
        self._checkpoint.set_form(name, form)
        try:
            return self._logits(states, place)
        finally:
            self._checkpoint.set_form(name, present)

    def _states_in_front_of(self, place: int) -> list[_State]:
        while self._at < place:
            if self._at == self._splice:
                self._in_front_of_splice = self._states
            self._states = self._run(self._segments[self._at], self._states)
            self._at += 1
        if self._at == place:
            return self._states
        if place == self._splice:
            return self._in_front_of_splice
        raise ValueError("layers must be measured in order of execution")

    @staticmethod
    def _run(segment: _Segment, states: Sequence[_State]) -> list[_State]:
        kept = nullcontext() if segment.modules is None else cache_dense_weights(segment.modules)
        with kept:
            return [segment.run(number, state) for number, state in enumerate(states)]

    def _logits(self, states: Sequence[_State], first: int) -> tuple[Tensor, ...]:
        """Of every sample, from states before a segment."""
        current = list(states)
        for segment in self._segments[first:]:
            current = self._run(segment, current)
        found: dict[int, Tensor] = {}
        for rows, state in zip(self._rows, current, strict=True):
            lengths = [
                self.prompts[row].answer_end - self.prompts[row].answer_start for row in rows
            ]
            found.update(zip(rows, state.hidden.split(lengths), strict=True))
        return tuple(found[row] for row in range(len(self.prompts)))

    def _build(self) -> tuple[_Segment, ...]:
        model, spec = self._checkpoint.model, self._checkpoint.spec
        segments = [
            self._tower_attention(block, sublayer)
            if sublayer.kind == "attention"
            else self._tower_ffn(block, sublayer)
            for block in range(spec.tower.feature_block)
            for sublayer in tower_sublayers(model, spec, block)
        ]
        last = tower_sublayers(model, spec, spec.tower.feature_block)
        encoder: list[nn.Module] = [sublayer.linears for sublayer in last]
        names = [*spec.projector.linears, *(name for tap in spec.taps for name in tap.linears)]
        encoder += [model.get_submodule(name) for name in names]
        # One segment, because the reducer reads what enters the block as well as what leaves it.
        segments.append(_Segment(modules=nn.ModuleList(encoder), run=self._encode))
        segments.append(_Segment(modules=None, run=self._embed_prompt))
        segments += [
            self._decoder_sublayer(sublayer, block)
            for block in range(spec.decoder.depth)
            for sublayer in decoder_sublayers(model, spec, block)
        ]
        head = model.get_submodule(spec.decoder.head)
        segments.append(_Segment(modules=head, run=self._answer_logits))
        return tuple(segments)

    def _tower_attention(self, block: int, sublayer: Sublayer) -> _Segment:
        """The attention of a block of the tower, with the merge of tokens that may follow it."""
        model, spec = self._checkpoint.model, self._checkpoint.spec
        is_read = block in read_blocks(self._checkpoint)

        def run(_: int, state: _State) -> _State:
            before = TowerState(hidden=state.hidden, tokens=state.tokens)
            after = run_tower_attention(model, spec, block, before)
            entering = {**state.entering, block: before} if is_read else state.entering
            return replace(state, hidden=after.hidden, tokens=after.tokens, entering=entering)

        return _Segment(modules=sublayer.linears, run=run)

    def _tower_ffn(self, block: int, sublayer: Sublayer) -> _Segment:
        """The feed-forward network of a block of the tower, whose output the decoder may read."""
        taps = sum(tap.block == block for tap in self._checkpoint.spec.taps)

        def run(_: int, state: _State) -> _State:
            hidden = sublayer.run(state.hidden, state.tokens)
            return replace(state, hidden=hidden, tapped=(*state.tapped, *[hidden] * taps))

        return _Segment(modules=sublayer.linears, run=run)

    def _decoder_sublayer(self, sublayer: Sublayer, block: int) -> _Segment:
        """One sublayer of a block of the decoder; visual rows may be dropped around it."""
        drops = sublayer.kind == "attention"

        def run(_: int, state: _State) -> _State:
            hidden, left = state.hidden, cast("RowsLeft", state.left)
            if not drops:
                return _State(hidden=sublayer.run(hidden, left.rows), left=left)
            rows = BlockRows.of(self._checkpoint, block, hidden, left)
            middle = sublayer.run(rows.entering(hidden), rows.attention.rows)
            return _State(hidden=rows.between(middle), left=rows.ffn)

        return _Segment(modules=sublayer.linears, run=run)

    def _embed(self, rows: Sequence[int], samples: CalibrationSet) -> _State:
        pixels = samples.pixels(self._checkpoint.processor, rows)
        return _State(hidden=embed_patches(self._checkpoint.model, self._checkpoint.spec, pixels))

    def _encode(self, _: int, state: _State) -> _State:
        model, spec = self._checkpoint.model, self._checkpoint.spec
        last = spec.tower.feature_block
        before = TowerState(hidden=state.hidden, tokens=state.tokens)
        visual = encode_features(
            self._checkpoint,
            run_tower_block(model, spec, last, before),
            {**state.entering, last: before},
            state.tapped,
        )
        return _State(hidden=visual.embeds, indices=visual.indices)

    def _embed_prompt(self, number: int, state: _State) -> _State:
        spec = self._checkpoint.spec
        visual = VisualTokens(embeds=state.hidden, indices=cast("Tensor", state.indices))
        inputs = embed_samples(self._checkpoint, self.prompts, self._rows[number], visual)
        left = RowsLeft.of(inputs.rows(spec.decoder), inputs.is_visual, inputs.reader)
        return _State(hidden=inputs.embeds, left=left)

    def _answer_logits(self, number: int, state: _State) -> _State:
        """Logits that predict the answers' tokens, [tokens, vocabulary], sample after sample."""
        model, spec = self._checkpoint.model, self._checkpoint.spec
        rows = [
            hidden[self.prompts[row].predicting(hidden.shape[0])]
            for row, hidden in zip(self._rows[number], state.hidden, strict=True)
        ]
        normed = model.get_submodule(spec.decoder.norm)(torch.cat(rows))
        return _State(hidden=model.get_submodule(spec.decoder.head)(normed))


def _require_answer(prompt: Prompt) -> None:
    if not prompt.has_answer:
        raise CalibrationError(
            f"{prompt.where}: has no answer, or all of it was cut off; sensitivity is measured at "
            "the answers' tokens, so every sample needs one"
        )
