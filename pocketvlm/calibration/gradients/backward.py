"""The answer's loss and its gradients, carried back through the decoder one block at a time.

The hidden states before all blocks are stored on the way forward, so that no more than one
block's graph ever exists: what it takes is one dense block, one batch's graph, and activations that
go to a file where they do not fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from pocketvlm.calibration.data.decoder_inputs import embed_samples, tokens_of
from pocketvlm.calibration.data.prompts import (
    Prompt,
    PromptBatch,
    batch_prompts,
    encode_samples,
)
from pocketvlm.calibration.gradients.block_graph import (
    dense_weights,
    linears_of,
    record_block,
)
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.calibration.walk.activations import ActivationStore
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import CalibrationError
from pocketvlm.reference_graph.decoder_rows import DecoderRows
from pocketvlm.reference_graph.forward import (
    DecoderInputs,
    VisualTokens,
    encode_images,
)
from pocketvlm.reference_graph.sublayers import SublayerKind, decoder_sublayers
from pocketvlm.reference_graph.visual_schedule import BlockRows, RowsLeft
from pocketvlm.weights.modules import cache_dense_weights

__all__ = [
    "AnswerLoss",
    "EnteredBatch",
    "LayerGradients",
    "answer_loss",
    "enter_decoder",
    "enter_samples",
    "require_answers",
    "visual_gradients",
    "walk_back",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerLoss:
    """The decoder's forward pass on prompts with answers, ready to be walked back.

    Attributes:
        entering: Hidden states [batch, length, width] before every block: of batch b and
            block i at `i * len(gradient) + b`.
        gradient: The loss's gradient after the last block, of each batch.
        rows: Which rows every block ran, of each batch, numbered as in `entering`.
        is_visual: bool [batch, length]: which columns came from an image, of each batch.
        mean: The loss's mean over samples.
    """

    entering: ActivationStore
    gradient: ActivationStore
    rows: tuple[BlockRows, ...]
    is_visual: tuple[Tensor, ...]
    mean: float

    def rows_at(self, block: int, batch: int, kind: SublayerKind) -> RowsLeft:
        """The rows that a sublayer runs, those included that are dropped at its end."""
        rows = self.rows[block * len(self.gradient) + batch]
        return rows.attention if kind == "attention" else rows.ffn


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerGradients:
    """A loss's gradients at one decoder block, of one batch.

    Attributes:
        block: Which block.
        batch: Which batch.
        inputs: What each linear read [batch, length, in_features], by name.
        outputs: Gradient at each linear's output [batch, length, out_features], by name.
        weights: Gradient of each linear's dense weight [out_features, in_features], by name;
            empty unless asked for.
    """

    block: int
    batch: int
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]


@contextmanager
def answer_loss(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    batches: Sequence[PromptBatch],
    visual: VisualTokens,
    spill_folder: Path | None = None,
) -> Iterator[AnswerLoss]:
    """Runs the decoder forwards and takes the loss; frees what it stored when the block ends.

    The loss of a sample is the mean cross-entropy of its answer's tokens, the end of the answer
    included; what is differentiated is the samples' sum, so that no gradient depends on which
    samples share a batch.

    Args:
        checkpoint: The model.
        prompts: Prompts with their answers.
        batches: Which of them run together.
        visual: Visual tokens of every sample, in order.
        spill_folder: Where activations go that do not fit into memory.

    Raises:
        CalibrationError: A sample has no answer, its answer was cut off, or its loss is not
            finite.
    """
    require_answers(prompts)
    model, spec = checkpoint.model, checkpoint.spec
    left: list[RowsLeft] = []
    is_visual: list[Tensor] = []
    rows: list[BlockRows] = []
    with ExitStack() as stack:
        device = checkpoint.device
        entering = stack.enter_context(ActivationStore(spill_folder, device=device))
        # Hidden states on the way forward, gradients from the loss on.
        states = stack.enter_context(ActivationStore(spill_folder, device=device))
        with torch.no_grad():
            for batch in batches:
                inputs, beside = enter_decoder(checkpoint, prompts, batch, visual)
                states.append(inputs.embeds)
                is_visual.append(inputs.is_visual)
                left.append(RowsLeft.of(beside, inputs.is_visual, inputs.reader))
        for block in range(spec.decoder.depth):
            sublayers = decoder_sublayers(model, spec, block)
            with torch.no_grad(), dense_weights([sublayer.linears for sublayer in sublayers]):
                for index, hidden in enumerate(states):
                    entering.append(hidden)
                    rows.append(BlockRows.of(checkpoint, block, hidden, left[index]))
                    states[index] = rows[-1].run(sublayers, hidden)
                    left[index] = rows[-1].ffn
        total = 0.0
        norm = model.get_submodule(spec.decoder.norm)
        head = model.get_submodule(spec.decoder.head)
        with torch.enable_grad(), cache_dense_weights(head):
            for index, batch in enumerate(batches):
                leaf = states[index].detach().requires_grad_()
                value = leaf.new_zeros(())
                for row, sample in enumerate(batch.samples):
                    columns = prompts[sample].predicting(leaf.shape[1])
                    logits = head(norm(leaf[row, columns]))
                    own = _cross_entropy(logits, prompts[sample])
                    if not bool(torch.isfinite(own)):
                        raise CalibrationError(
                            f"{prompts[sample].where}: the loss of its answer is not finite"
                        )
                    value = value + own
                (states[index],) = torch.autograd.grad(value, [leaf])
                total += float(value.detach())
        yield AnswerLoss(
            entering=entering,
            gradient=states,
            rows=tuple(rows),
            is_visual=tuple(is_visual),
            mean=total / sum(len(batch.samples) for batch in batches),
        )


def walk_back(
    checkpoint: Checkpoint, loss: AnswerLoss, *, weights: bool = False
) -> Iterator[LayerGradients]:
    """Carries the loss's gradient back through the decoder, from the last block to the first.

    `loss.gradient` is replaced on the way; after the first block it is that of the embeddings.

    Args:
        checkpoint: The model that the loss was taken of.
        loss: What `answer_loss` gave.
        weights: Whether the gradients of the weights are computed too, which costs one more dense
            block.

    Yields:
        Gradients of every block and batch, batches of one block in order.
    """
    count = len(loss.gradient)
    for block in reversed(range(checkpoint.spec.decoder.depth)):
        sublayers = decoder_sublayers(checkpoint.model, checkpoint.spec, block)
        with dense_weights([sublayer.linears for sublayer in sublayers]):
            layers = linears_of(sublayers)
            if weights:
                for layer in layers.values():
                    layer.cached = layer.weight.detach().requires_grad_()
            leaves = [layer.weight for layer in layers.values()] if weights else []
            for batch in range(count):
                place = block * count + batch
                graph = record_block(
                    partial(loss.rows[place].run, sublayers), layers, loss.entering[place]
                )
                entering, outputs, found = graph.pull(loss.gradient[batch], leaves)
                loss.gradient[batch] = entering
                yield LayerGradients(
                    block=block,
                    batch=batch,
                    inputs=graph.inputs,
                    outputs=outputs,
                    weights=dict(zip(layers, found, strict=False)),
                )


@torch.no_grad()
def enter_decoder(
    checkpoint: Checkpoint, prompts: Sequence[Prompt], batch: PromptBatch, visual: VisualTokens
) -> tuple[DecoderInputs, DecoderRows]:
    """A batch of prompts before the first block, and what attention takes beside them."""
    own = tokens_of(prompts, batch.samples, visual)
    inputs = embed_samples(checkpoint, prompts, batch.samples, own)
    return inputs, inputs.rows(checkpoint.spec.decoder)


def visual_gradients(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    batch: PromptBatch,
    visual: VisualTokens,
    gradient: Tensor,
) -> Tensor:
    """Gradients of a batch's visual tokens, [tiles, k, width], from those of its embeddings."""
    own = tokens_of(prompts, batch.samples, visual)
    leaf = own.embeds.detach().requires_grad_()
    with torch.enable_grad():
        seen = replace(own, embeds=leaf)
        entering = embed_samples(checkpoint, prompts, batch.samples, seen).embeds
        (found,) = torch.autograd.grad(entering, [leaf], gradient)
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class EnteredBatch:
    """Samples with answers, as they enter the decoder.

    Attributes:
        samples: Their numbers.
        prompts: Their prompts.
        inputs: What enters.
        rows: What attention takes beside it.
    """

    samples: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    inputs: DecoderInputs
    rows: DecoderRows


def enter_samples(
    checkpoint: Checkpoint, samples: CalibrationSet, *, batch_tokens: int, reason: str
) -> Iterator[EnteredBatch]:
    """Encodes samples and splices their pictures, batch by batch.

    Args:
        checkpoint: The model.
        samples: Pictures with questions and answers.
        batch_tokens: Tokens of a batch, at most.
        reason: Why every sample needs an answer.

    Raises:
        CalibrationError: A sample cannot be used or has no answer.
    """
    prompts = encode_samples(checkpoint.processor, samples)
    for prompt in prompts:
        if not prompt.has_answer:
            raise CalibrationError(
                f"{prompt.where}: has no answer, or all of it was cut off; {reason}, so every "
                "sample needs one"
            )
    for together in batch_prompts(prompts, len(prompts), batch_tokens):
        own = tuple(prompts[index] for index in together.samples)
        visual = encode_images(checkpoint, samples.pixels(checkpoint.processor, together.samples))
        # Renumbered: prompts and visual tokens are this batch's own.
        alone = PromptBatch(samples=tuple(range(len(own))), held_out=False)
        inputs, rows = enter_decoder(checkpoint, own, alone, visual)
        yield EnteredBatch(samples=together.samples, prompts=own, inputs=inputs, rows=rows)


def require_answers(prompts: Sequence[Prompt]) -> None:
    """Checks that every prompt has an answer whose loss can be taken.

    Raises:
        CalibrationError: A sample has no answer, or its answer was cut off.
    """
    for prompt in prompts:
        _require_answer(prompt)


def _require_answer(prompt: Prompt) -> None:
    if prompt.has_answer:
        return
    if prompt.is_truncated:
        raise CalibrationError(
            f"{prompt.where}: its answer lies after token {len(prompt.token_ids)}, where it was "
            "cut off; a gradient needs an answer"
        )
    raise CalibrationError(
        f"{prompt.where}: has no answer; gradients are those of the answer's loss, so every sample "
        "needs one"
    )


def _cross_entropy(logits: Tensor, prompt: Prompt) -> Tensor:
    answer = prompt.token_ids[prompt.answer_start : prompt.answer_end]
    return functional.cross_entropy(logits, torch.tensor(answer, device=logits.device))
