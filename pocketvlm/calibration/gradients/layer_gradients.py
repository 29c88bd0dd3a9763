"""Gradients of every sample's own loss at every linear of a model, one block's graph at a time.

Two losses. `walk_gradients` takes that of the answer and carries it from the decoder through the
visual tokens and the projector into the tower; `block_gradients` takes the length of each block's
own output, which needs no answers and no way back.

A weight's gradient is never formed here: with a linear's inputs x_t and the gradients g_t at its
outputs, that of one sample is sum_t g_t x_t^T, and who needs it takes the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pocketvlm.calibration.data.prompts import (
    PromptBatch,
    batch_images,
    batch_prompts,
    encode_samples,
    tile_rows,
)
from pocketvlm.calibration.gradients.backward import (
    answer_loss,
    enter_decoder,
    require_answers,
    visual_gradients,
    walk_back,
)
from pocketvlm.calibration.gradients.block_graph import (
    dense_weights,
    linears_of,
    record_block,
)
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.calibration.walk.activations import ActivationStore
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import ALONE, Ranks
from pocketvlm.errors import CalibrationError, RecipeError
from pocketvlm.reference_graph.decoder_rows import DecoderRows
from pocketvlm.reference_graph.forward import VisualTokens, embed_patches, project, tower_features
from pocketvlm.reference_graph.sublayers import (
    Sublayer,
    decoder_sublayers,
    run_sublayers,
    tower_sublayers,
)
from pocketvlm.weights.modules import FormLinear

__all__ = ["LayerGradient", "block_gradients", "walk_gradients"]

# Tokens whose graph of one block is held at once.
_BATCH_TOKENS = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerGradient:
    """What one linear read on one batch, and the gradients at what it gave.

    The gradient of sample n's loss in the layer's weight is `outputs[n].T @ inputs[n]`.

    Attributes:
        name: The linear.
        samples: The batch's samples, as indices into the calibration set.
        inputs: [batch, tokens, in_features].
        outputs: [batch, tokens, out_features]: the gradient of each sample's own loss.
        is_last: Whether this is the layer's last batch. A block's layers take turns, batch by
            batch, and end together: who sums over samples holds one block's sums and no more.
    """

    name: str
    samples: tuple[int, ...]
    inputs: Tensor
    outputs: Tensor
    is_last: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class _Region:
    """What is differentiated at once: a block, or the projector with the merge before it.

    What leaves a block of the tower may carry features of earlier ones after its own `width`.
    """

    modules: tuple[nn.Module, ...]
    layers: Mapping[str, FormLinear]
    run: Callable[[DecoderRows | None, Tensor], Tensor]
    width: int


def walk_gradients(
    checkpoint: Checkpoint,
    samples: CalibrationSet,
    *,
    spill_folder: Path | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[LayerGradient]:
    """Gradients of the answers' losses, from the decoder's last block back to the tower's first.

    The loss of a sample is the mean cross-entropy of its answer's tokens. Samples that share a
    batch do not mix, so each has the gradient that it would have alone.

    Args:
        checkpoint: The model; it must not change during the walk.
        samples: Pictures, questions and answers, of this rank.
        spill_folder: Where activations go that do not fit into memory.
        ranks: The processes that walk at the same time; a layer needs a gradient on one of them.

    Yields:
        Every linear's gradients, batch by batch; embedding and head have none.

    Raises:
        CalibrationError: A sample has no answer, its loss or a gradient is not finite, or a layer
            has no gradient at all.
        RecipeError: The checkpoint drops visual tokens.
    """
    _require_all_tokens(checkpoint)
    prompts = encode_samples(checkpoint.processor, samples)
    require_answers(prompts)
    images = _image_batches(checkpoint, samples)
    batches = batch_prompts(prompts, len(prompts), _BATCH_TOKENS)
    watch = _Watch(samples, ranks)
    regions = _vision_regions(checkpoint)
    device = checkpoint.device
    with (
        ActivationStore(spill_folder, device=device) as entering,
        ActivationStore(spill_folder, device=device) as states,
    ):
        states.extend(_patches(checkpoint, samples, images))
        with torch.no_grad():
            for region in regions[:-1]:
                with dense_weights(region.modules):
                    for index, hidden in enumerate(states):
                        entering.append(hidden)
                        states[index] = region.run(None, hidden)
            entering.extend(states)
            with dense_weights(regions[-1].modules):
                visual = _visual_tokens([regions[-1].run(None, hidden) for hidden in states])
        with answer_loss(checkpoint, prompts, batches, visual, spill_folder) as loss:
            for step in walk_back(checkpoint, loss):
                is_last = step.batch == len(batches) - 1
                yield from watch.pass_on(step.inputs, step.outputs, batches[step.batch], is_last)
            leaving = torch.empty_like(visual.embeds)
            for batch, gradient in zip(batches, loss.gradient, strict=True):
                leaving[tile_rows(prompts, batch.samples)] = visual_gradients(
                    checkpoint, prompts, batch, visual, gradient
                )
        for number, region in reversed(list(enumerate(regions))):
            is_projector = number == len(regions) - 1
            run = partial(region.run, None)
            with dense_weights(region.modules):
                for index, batch in enumerate(images):
                    hidden = entering[number * len(images) + index]
                    graph = record_block(run, region.layers, hidden)
                    tiles = tile_rows(prompts, batch.samples)
                    gradient = leaving[tiles] if is_projector else states[index]
                    states[index], outputs, _ = graph.pull(gradient)
                    is_last = index == len(images) - 1
                    yield from watch.pass_on(graph.inputs, outputs, batch, is_last)


def block_gradients(
    checkpoint: Checkpoint,
    samples: CalibrationSet,
    *,
    spill_folder: Path | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[LayerGradient]:
    """Gradients of the length of each block's own output, from the tower's first block forwards.

    The regional gradient of Wanda++ (arXiv 2503.04992): a sample's loss in a block is the l2 norm
    of the hidden state that leaves it, over all tokens. It needs no answers, and neither a way
    back nor stored hidden states. The projector, from the tower's last state to the visual tokens,
    is a block like any other. Blocks read what the model as it is now computes; Wanda++ takes
    gradients after blocks that were pruned already.

    Args:
        checkpoint: The model; it must not change during the walk.
        samples: Pictures and text, with or without answers, of this rank.
        spill_folder: Where activations go that do not fit into memory.
        ranks: As `walk_gradients`.

    Yields:
        Every linear's gradients, batch by batch; embedding and head have none.

    Raises:
        CalibrationError: A gradient is not finite, or a layer has no gradient at all.
        RecipeError: The checkpoint drops visual tokens.
    """
    _require_all_tokens(checkpoint)
    model, spec = checkpoint.model, checkpoint.spec
    prompts = encode_samples(checkpoint.processor, samples)
    images = _image_batches(checkpoint, samples)
    watch = _Watch(samples, ranks)
    *blocks, projector = _vision_regions(checkpoint)
    embeds: list[Tensor] = []
    with ActivationStore(spill_folder, device=checkpoint.device) as states:
        states.extend(_patches(checkpoint, samples, images))
        for region in blocks:
            yield from _regional(region, states, images, (), states.__setitem__, watch)
        yield from _regional(
            projector, states, images, (), lambda _, new: embeds.append(new), watch
        )
    visual = _visual_tokens(embeds)
    batches = batch_prompts(prompts, len(prompts), _BATCH_TOKENS)
    beside: list[DecoderRows] = []
    with ActivationStore(spill_folder, device=checkpoint.device) as states:
        for batch in batches:
            inputs, taken = enter_decoder(checkpoint, prompts, batch, visual)
            states.append(inputs.embeds)
            beside.append(taken)
        for block in range(spec.decoder.depth):
            region = _block_region(decoder_sublayers(model, spec, block))
            yield from _regional(region, states, batches, beside, states.__setitem__, watch)


def _regional(
    region: _Region,
    states: ActivationStore,
    batches: Sequence[PromptBatch],
    rows: Sequence[DecoderRows],
    keep: Callable[[int, Tensor], None],
    watch: _Watch,
) -> Iterator[LayerGradient]:
    """One region's gradients; hands what leaves it to `keep`."""
    with dense_weights(region.modules):
        for index, batch in enumerate(batches):
            run = partial(region.run, rows[index] if rows else None)
            graph = record_block(run, region.layers, states[index])
            leaving = graph.leaving.detach()
            own = leaving[..., : region.width]
            # Tiles of one sample are its tokens.
            dims = (1, 2) if len(own) == len(batch.samples) else (0, 1, 2)
            lengths = torch.linalg.vector_norm(own, dim=dims, keepdim=True)
            # The norm of zero has no gradient; zero is a subgradient of it.
            gradient = torch.where(lengths == 0, 0.0, own / lengths)
            carried = leaving.shape[-1] - own.shape[-1]
            _, outputs, _ = graph.pull(functional.pad(gradient, (0, carried)))
            keep(index, leaving)
            yield from watch.pass_on(graph.inputs, outputs, batch, index == len(batches) - 1)


class _Watch:
    """Hands gradients on and refuses those that no score can be made of."""

    def __init__(self, samples: CalibrationSet, ranks: Ranks) -> None:
        self._samples = samples.samples
        self._ranks = ranks
        self._moved: set[str] = set()

    def pass_on(
        self,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        batch: PromptBatch,
        is_last: bool,
    ) -> Iterator[LayerGradient]:
        """The gradients of a block's layers on one batch, one by one."""
        for name, values in outputs.items():
            gradient = _by_sample(values, batch)
            finite = torch.isfinite(gradient).flatten(1).all(dim=1)
            if not bool(finite.all()):
                sample = batch.samples[int(finite.logical_not().nonzero()[0])]
                where = self._samples[sample].where
                raise CalibrationError(f"{where}: its gradient at {name} is not finite")
            if name not in self._moved and bool(gradient.any()):
                self._moved.add(name)
            if is_last and not any(self._ranks.documents(name in self._moved)):
                raise CalibrationError(
                    f"{name}: its gradient is zero on all {len(self._samples)} samples, since "
                    "nothing after it reads what it gives; a gradient cannot score it"
                )
            yield LayerGradient(
                name=name,
                samples=batch.samples,
                inputs=_by_sample(inputs[name], batch),
                outputs=gradient,
                is_last=is_last,
            )


def _by_sample(values: Tensor, batch: PromptBatch) -> Tensor:
    """Values [tiles, tokens, channels] with all tokens of a sample in one row."""
    return values.reshape(len(batch.samples), -1, values.shape[-1])


def _require_all_tokens(checkpoint: Checkpoint) -> None:
    if checkpoint.reducer is not None or checkpoint.visual_schedule is not None:
        raise RecipeError(
            "gradients of the whole model are taken before visual tokens are dropped; put the "
            "stage that takes them before the one that drops tokens"
        )
    if checkpoint.spec.tower.merges:
        raise RecipeError(
            "gradients of the whole model are taken before tokens of the tower are merged; put "
            "the stage that takes them before merge_tokens"
        )


def _image_batches(checkpoint: Checkpoint, samples: CalibrationSet) -> tuple[PromptBatch, ...]:
    spec, count = checkpoint.spec, len(samples)
    # The tiles of one sample have one gradient together.
    per_batch = 1 if spec.tiling is not None else max(1, _BATCH_TOKENS // spec.tower.tokens)
    return batch_images(count, count, per_batch, fitted=count, judging=0)


@torch.no_grad()
def _patches(
    checkpoint: Checkpoint, samples: CalibrationSet, images: Sequence[PromptBatch]
) -> Iterator[Tensor]:
    """What enters the tower, batch by batch."""
    for batch in images:
        pixels = samples.pixels(checkpoint.processor, batch.samples)
        # In the layout that comes back from a file too: products round by layout.
        yield embed_patches(checkpoint.model, checkpoint.spec, pixels).contiguous()


def _visual_tokens(embeds: Sequence[Tensor]) -> VisualTokens:
    joined = torch.cat(list(embeds))
    indices = torch.arange(joined.shape[1], device=joined.device).expand(joined.shape[0], -1)
    return VisualTokens(embeds=joined, indices=indices)


def _vision_regions(checkpoint: Checkpoint) -> tuple[_Region, ...]:
    """The tower's blocks in order, and the projector."""
    model, spec = checkpoint.model, checkpoint.spec
    layers = {
        name: cast("FormLinear", model.get_submodule(name)) for name in spec.projector.linears
    }

    def run_projector(_rows: DecoderRows | None, hidden: Tensor) -> Tensor:
        return project(model, spec, tower_features(model, spec, hidden))

    projector = _Region(
        modules=tuple(layers.values()),
        layers=layers,
        run=run_projector,
        width=spec.decoder.hidden_size,
    )
    blocks = range(spec.tower.feature_block + 1)
    return (*(_block_region(tower_sublayers(model, spec, block)) for block in blocks), projector)


def _block_region(sublayers: tuple[Sublayer, Sublayer]) -> _Region:
    return _Region(
        modules=tuple(sublayer.linears for sublayer in sublayers),
        layers=linears_of(sublayers),
        run=partial(run_sublayers, sublayers),
        width=sublayers[0].width,
    )
