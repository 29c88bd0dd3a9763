"""The answer's loss and its gradients, carried back through the decoder one block at a time.

The hidden states in front of all blocks are stored on the way forward, so that no more than one
block's graph ever exists: what it takes is one dense block, one batch's graph, and activations that
go to a file where they do not fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pocketvlm.calibration.activations import ActivationStore
from pocketvlm.calibration.halves import HalfBlock, decoder_halves
from pocketvlm.calibration.prompts import Prompt, PromptBatch
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import CalibrationError
from pocketvlm.forward import VisualTokens, embed_prompts
from pocketvlm.weights import FormLinear, cache_dense_weights

__all__ = ["AnswerLoss", "LayerGradients", "answer_loss", "walk_back"]


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerLoss:
    """The decoder's forward pass on prompts with answers, ready to be walked back.

    Attributes:
        entering: Hidden states [batch, length, width] in front of every block: of batch b and
            block i at `i * len(gradient) + b`.
        gradient: The loss's gradient behind the last block, of each batch.
        arguments: What attention takes beside the hidden state, of each batch.
        is_visual: bool [batch, length]: which columns came from an image, of each batch.
        mean: The loss's mean over samples.
    """

    entering: ActivationStore
    gradient: ActivationStore
    arguments: tuple[Mapping[str, Any], ...]
    is_visual: tuple[Tensor, ...]
    mean: float


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerGradients:
    """A loss's gradients at one decoder block, of one batch.

    Attributes:
        block: Which block.
        batch: Which batch.
        outputs: Gradient at each linear's output [batch, length, out_features], by name.
        weights: Gradient of each linear's dense weight [out_features, in_features], by name;
            empty unless asked for.
    """

    block: int
    batch: int
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
    for prompt in prompts:
        _require_answer(prompt)
    model, spec = checkpoint.model, checkpoint.spec
    rotary = cast("Any", model.get_submodule(spec.decoder.prefix)).rotary_emb
    removed = spec.visual_tokens - visual.embeds.shape[1]
    arguments: list[Mapping[str, Any]] = []
    is_visual: list[Tensor] = []
    with ExitStack() as stack:
        entering = stack.enter_context(ActivationStore(spill_folder))
        # Hidden states on the way forward, gradients from the loss on.
        states = stack.enter_context(ActivationStore(spill_folder))
        with torch.no_grad():
            for batch in batches:
                rows = list(batch.samples)
                inputs = embed_prompts(
                    checkpoint,
                    torch.tensor([prompts[index].token_ids for index in rows]),
                    VisualTokens(embeds=visual.embeds[rows], indices=visual.indices[rows]),
                )
                states.append(inputs.embeds)
                is_visual.append(inputs.is_visual)
                angles = rotary(inputs.embeds, position_ids=inputs.positions)
                arguments.append({"attention_mask": None, "position_embeddings": angles})
        for block in range(spec.decoder.depth):
            halves = decoder_halves(model, spec, block)
            with _cached(halves):
                for index, hidden in enumerate(states):
                    entering.append(hidden)
                    middle = halves[0].run(hidden, arguments[index])
                    states[index] = halves[1].run(middle, {})
        total = 0.0
        norm = model.get_submodule(f"{spec.decoder.prefix}.norm")
        head = model.get_submodule(spec.decoder.head)
        with torch.enable_grad(), cache_dense_weights(head):
            for index, batch in enumerate(batches):
                leaf = states[index].detach().requires_grad_()
                value = torch.zeros(())
                for row, sample in enumerate(batch.samples):
                    columns = _answer_columns(prompts[sample], removed)
                    logits = head(norm(leaf[row, columns]))
                    value = value + _cross_entropy(logits, prompts[sample])
                if not bool(torch.isfinite(value)):
                    raise CalibrationError(
                        f"{prompts[batch.samples[0]].where}: the loss of its batch is not finite"
                    )
                (states[index],) = torch.autograd.grad(value, [leaf])
                total += float(value.detach())
        yield AnswerLoss(
            entering=entering,
            gradient=states,
            arguments=tuple(arguments),
            is_visual=tuple(is_visual),
            mean=total / sum(len(batch.samples) for batch in batches),
        )


def walk_back(
    checkpoint: Checkpoint, loss: AnswerLoss, *, weights: bool = False
) -> Iterator[LayerGradients]:
    """Carries the loss's gradient back through the decoder, from the last block to the first.

    `loss.gradient` is replaced on the way; behind the first block it is that of the embeddings.

    Args:
        checkpoint: The model that the loss was taken of.
        loss: What `answer_loss` gave.
        weights: Whether the gradients of the weights are computed too, which costs one more dense
            block.

    Yields:
        Gradients of every block and batch, batches of one block in order.
    """
    count = len(loss.arguments)
    for block in reversed(range(checkpoint.spec.decoder.depth)):
        halves = decoder_halves(checkpoint.model, checkpoint.spec, block)
        with _cached(halves):
            layers = _linears(halves)
            if weights:
                for layer in layers.values():
                    layer.cached = layer.weight.detach().requires_grad_()
            for batch in range(count):
                hidden = loss.entering[block * count + batch].detach().requires_grad_()
                outputs: dict[str, Tensor] = {}
                with torch.enable_grad(), _recorded(layers, outputs):
                    middle = halves[0].output(hidden, loss.arguments[batch])
                    behind = halves[1].output(middle, {})
                leaves = [layer.weight for layer in layers.values()] if weights else []
                entering, *found = torch.autograd.grad(
                    behind, [hidden, *outputs.values(), *leaves], loss.gradient[batch]
                )
                loss.gradient[batch] = entering
                yield LayerGradients(
                    block=block,
                    batch=batch,
                    outputs=dict(zip(outputs, found, strict=False)),
                    weights=dict(zip(layers, found[len(outputs) :], strict=False)),
                )


def _require_answer(prompt: Prompt) -> None:
    if prompt.answer_end > prompt.answer_start:
        return
    if prompt.is_truncated:
        raise CalibrationError(
            f"{prompt.where}: its answer lies behind token {len(prompt.token_ids)}, where it was "
            "cut off; a gradient needs an answer"
        )
    raise CalibrationError(
        f"{prompt.where}: has no answer; gradients are those of the answer's loss, so every sample "
        "needs one"
    )


def _answer_columns(prompt: Prompt, removed: int) -> slice:
    """Columns whose logits predict the answer: each token is predicted one column earlier."""
    # The image stands before the answer, so the tokens that were removed from it move all of it.
    return slice(prompt.answer_start - removed - 1, prompt.answer_end - removed - 1)


def _cross_entropy(logits: Tensor, prompt: Prompt) -> Tensor:
    answer = prompt.token_ids[prompt.answer_start : prompt.answer_end]
    return functional.cross_entropy(logits, torch.tensor(answer))


@contextmanager
def _cached(halves: Sequence[HalfBlock]) -> Iterator[None]:
    with ExitStack() as stack:
        for half in halves:
            stack.enter_context(cache_dense_weights(half.body))
        yield


def _linears(halves: Sequence[HalfBlock]) -> dict[str, FormLinear]:
    """The halves' linears by their full names, in order of execution."""
    layers = {}
    for half in halves:
        prefix = half.last.rpartition(".")[0]
        for name in (*half.first, half.last):
            layer = half.body.get_submodule(name.removeprefix(f"{prefix}."))
            layers[name] = cast("FormLinear", layer)
    return layers


@contextmanager
def _recorded(layers: Mapping[str, nn.Module], outputs: dict[str, Tensor]) -> Iterator[None]:
    """Puts every output into `outputs`, by the layer's name."""

    def record(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[name] = output

        return hook

    handles = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
