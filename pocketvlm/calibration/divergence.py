"""How far a changed layer moves the model's answers: divergence of its next-token distributions.

Whoever measures goes along the model in order of execution, and for every changed layer only what
lies behind it is run: hidden states in front of the current segment are kept, of all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pocketvlm.calibration.halves import HalfBlock, decoder_halves, tower_halves
from pocketvlm.calibration.prompts import Prompt, batch_prompts, encode_samples
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import CalibrationError
from pocketvlm.forward import VisualTokens, embed_patches, embed_prompts, encode_features
from pocketvlm.weights import WeightForm, cache_dense_weights

__all__ = ["DivergenceMeter", "mean_divergence"]

_BATCH_TOKENS = 1024


def mean_divergence(reference: Tensor, changed: Tensor) -> float:
    """Mean over tokens of KL(reference || changed), in nats.

    Args:
        reference: Logarithms of probabilities, [tokens, vocabulary].
        changed: Likewise.
    """
    return float((reference.exp() * (reference - changed)).sum(dim=-1).mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class _State:
    """One batch between two segments.

    Attributes:
        hidden: Hidden states, or visual tokens in front of the splice.
        indices: Which visual tokens these are, in front of the splice.
        angles: Rotary angles, in the decoder.
    """

    hidden: Tensor
    indices: Tensor | None = None
    angles: Any = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Segment:
    """A stretch of the model.

    Attributes:
        names: Weight matrices that it is the first to use.
        modules: Where dense weights are kept while all batches run through.
        run: From a batch's number and its state to the next state.
    """

    names: tuple[str, ...]
    modules: nn.Module | None
    run: Callable[[int, _State], _State]


class DivergenceMeter:
    """Compares the model, with one layer changed, with itself as it was when this was made.

    Layers must be visited in order of execution; a tied table, which belongs to both ends, may be
    visited at any time. Costs the hidden states of all samples, twice.

    Args:
        checkpoint: The model; its weights must stay as they are while this lives.
        samples: Pictures with questions and answers.

    Attributes:
        tokens: Answer tokens that are compared.

    Raises:
        CalibrationError: A sample cannot be used, or has no answer.
    """

    @torch.no_grad()
    def __init__(self, checkpoint: Checkpoint, samples: CalibrationSet) -> None:
        self._checkpoint = checkpoint
        self._prompts = encode_samples(checkpoint.processor, samples)
        for prompt in self._prompts:
            _require_answer(prompt)
        # The share of held-out samples is the caller's affair: here all are alike.
        batches = batch_prompts(self._prompts, len(self._prompts), _BATCH_TOKENS)
        self._rows = tuple(batch.samples for batch in batches)
        self._segments = self._build()
        self._place = {
            name: index for index, part in enumerate(self._segments) for name in part.names
        }
        self._splice = self._place[checkpoint.spec.decoder.embedding]
        self._at = 0
        self._states = [self._embed(rows, samples) for rows in self._rows]
        self._in_front_of_splice: list[_State] = []
        self._reference = self._log_probabilities(self._states, 0)
        self.tokens = self._reference.shape[0]

    def share_of_forward(self, name: str) -> float:
        """How much of a whole forward pass one measurement of a layer costs, in segments."""
        return 1 - self._place[name] / len(self._segments)

    @torch.no_grad()
    def divergence(self, name: str, form: WeightForm) -> float:
        """Mean KL divergence at the answers' tokens, in nats, with one layer in another form.

        Raises:
            ValueError: A layer behind this one was visited before.
            CalibrationError: The changed model's outputs are not finite.
        """
        present = self._checkpoint.form(name)
        index = self._place[name]
        states = self._states_in_front_of(index)
        self._checkpoint.set_form(name, form)
        try:
            changed = self._log_probabilities(states, index)
        finally:
            self._checkpoint.set_form(name, present)
        found = mean_divergence(self._reference, changed)
        if not torch.isfinite(torch.tensor(found)):
            raise CalibrationError(f"{name}: changed to another form, its outputs are not finite")
        return max(found, 0.0)

    def _states_in_front_of(self, index: int) -> list[_State]:
        while self._at < index:
            if self._at == self._splice:
                self._in_front_of_splice = self._states
            self._states = self._run(self._segments[self._at], self._states)
            self._at += 1
        if self._at == index:
            return self._states
        if index == self._splice:
            return self._in_front_of_splice
        raise ValueError("layers must be measured in order of execution")

    @staticmethod
    def _run(segment: _Segment, states: Sequence[_State]) -> list[_State]:
        kept = nullcontext() if segment.modules is None else cache_dense_weights(segment.modules)
        with kept:
            return [segment.run(number, state) for number, state in enumerate(states)]

    def _log_probabilities(self, states: Sequence[_State], first: int) -> Tensor:
        """Of all answers' tokens, float64 [tokens, vocabulary], from states in front of a segment.

        Float64, because the divergence of an 8-bit layer is a small difference of large numbers.
        """
        current = list(states)
        for segment in self._segments[first:]:
            current = self._run(segment, current)
        return torch.cat([state.hidden for state in current]).to(torch.float64).log_softmax(dim=-1)

    def _build(self) -> tuple[_Segment, ...]:
        model, spec = self._checkpoint.model, self._checkpoint.spec
        segments = [
            self._half(half)
            for block in range(spec.tower.feature_block)
            for half in tower_halves(model, spec, block)
        ]
        last = f"{spec.tower.blocks}.{spec.tower.feature_block}"
        # One segment, because the reducer reads what enters the block as well as what leaves it.
        segments.append(
            _Segment(
                names=tuple(
                    linear.name
                    for linear in spec.linears()
                    if linear.part == "projector" or linear.name.startswith(last + ".")
                ),
                modules=nn.ModuleList(
                    [model.get_submodule(name) for name in (last, *spec.projector.linears)]
                ),
                run=self._encode,
            )
        )
        decoder = spec.decoder
        segments.append(_Segment(names=(decoder.embedding,), modules=None, run=self._embed_prompt))
        segments += [
            self._half(half)
            for block in range(decoder.depth)
            for half in decoder_halves(model, spec, block)
        ]
        segments.append(
            _Segment(
                names=() if decoder.tied_head else (decoder.head,),
                modules=model.get_submodule(decoder.head),
                run=self._answer_logits,
            )
        )
        return tuple(segments)

    @staticmethod
    def _half(half: HalfBlock) -> _Segment:
        def run(_: int, state: _State) -> _State:
            arguments: dict[str, Any] = {}
            if half.kind == "attention":
                arguments["attention_mask"] = None
                if state.angles is not None:
                    arguments["position_embeddings"] = state.angles
            return _State(hidden=half.run(state.hidden, arguments), angles=state.angles)

        return _Segment(names=(*half.first, half.last), modules=half.body, run=run)

    def _embed(self, rows: Sequence[int], samples: CalibrationSet) -> _State:
        images = [samples.samples[row].open_image() for row in rows]
        pixels = self._checkpoint.processor.pixels(images)
        return _State(hidden=embed_patches(self._checkpoint.model, self._checkpoint.spec, pixels))

    def _encode(self, _: int, state: _State) -> _State:
        visual = encode_features(self._checkpoint, state.hidden)
        return _State(hidden=visual.embeds, indices=visual.indices)

    def _embed_prompt(self, number: int, state: _State) -> _State:
        spec = self._checkpoint.spec
        token_ids = torch.tensor([self._prompts[row].token_ids for row in self._rows[number]])
        visual = VisualTokens(embeds=state.hidden, indices=cast("Tensor", state.indices))
        inputs = embed_prompts(self._checkpoint, token_ids, visual)
        rotary = cast("Any", self._checkpoint.model.get_submodule(spec.decoder.prefix)).rotary_emb
        angles = rotary(inputs.embeds, position_ids=inputs.positions)
        return _State(hidden=inputs.embeds, angles=angles)

    def _answer_logits(self, number: int, state: _State) -> _State:
        """Logits that predict the answers' tokens, [tokens, vocabulary], sample after sample."""
        model, spec = self._checkpoint.model, self._checkpoint.spec
        rows = [
            hidden[_predicting(self._prompts[row], hidden.shape[0])]
            for row, hidden in zip(self._rows[number], state.hidden, strict=True)
        ]
        normed = model.get_submodule(f"{spec.decoder.prefix}.norm")(torch.cat(rows))
        return _State(hidden=model.get_submodule(spec.decoder.head)(normed))


def _predicting(prompt: Prompt, length: int) -> slice:
    """Columns whose logits predict the answer, in a sequence of this length."""
    # The image stands before the answer, so the tokens that were removed from it move all of it.
    shift = len(prompt.token_ids) - length + 1
    return slice(prompt.answer_start - shift, prompt.answer_end - shift)


def _require_answer(prompt: Prompt) -> None:
    if prompt.answer_end <= prompt.answer_start:
        raise CalibrationError(
            f"{prompt.where}: has no answer, or all of it was cut off; sensitivity is measured at "
            "the answers' tokens, so every sample needs one"
        )
