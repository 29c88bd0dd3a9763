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
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from pocketvlm.calibration.data.modality import ModalityWeighting, TokenCounts, token_weights
from pocketvlm.calibration.data.prompts import (
    Prompt,
    PromptBatch,
    batch_grids,
    batch_images,
    batch_prompts,
    encode_samples,
    tile_rows,
)
from pocketvlm.calibration.gradients.token_weights import gradient_weights
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.calibration.walk.activations import ActivationStore, join_batches
from pocketvlm.calibration.walk.paired_activations import (
    PairedActivations,
    advance,
    forms_in_place,
    measure_moments,
)
from pocketvlm.calibration.walk.shared_batches import SharedBatches
from pocketvlm.calibration.walk.steps import (
    Drift,
    FinishedSublayer,
    InputMoments,
    LinearGroup,
    Step,
    TokenWeights,
)
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import ALONE, Ranks
from pocketvlm.errors import CalibrationError
from pocketvlm.graph.builders import merged_features
from pocketvlm.graph.token_merging import TowerTokens, merge_tokens
from pocketvlm.models.projector import ProjectorStep, run_steps, step_linears
from pocketvlm.models.token_merging import TokenMerge
from pocketvlm.reference_graph.forward import (
    DecoderInputs,
    VisualTokens,
    embed_patches,
    embed_prompts,
    read_blocks,
    reduce_features,
    tower_features,
)
from pocketvlm.reference_graph.sublayers import (
    Sublayer,
    SublayerKind,
    SublayerRows,
    decoder_sublayers,
    tower_sublayers,
)
from pocketvlm.reference_graph.torch_ops import TorchOps
from pocketvlm.reference_graph.tower_states import TowerState, match_after
from pocketvlm.reference_graph.visual_schedule import DroppedRows, RowsLeft, drop_rows
from pocketvlm.weights.modules import cache_dense_weights

__all__ = ["BlockWalk", "Drift", "FinishedSublayer", "InputMoments", "LinearGroup"]

_NOTHING = torch.zeros(0)

DropsOf = Callable[[int], DroppedRows | None]
"""What is dropped after a sublayer, by batch."""

DecoderWeights = Callable[
    [int, SublayerKind, Sequence[RowsLeft], Literal["first", "last"], int], Tensor | None
]
"""Weights of rows at a linear: block, sublayer, what every batch has left, place, and batch."""

# Tokens that run through a sublayer at once: enough for full speed, little enough memory.
_BATCH_TOKENS = 1024


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
            max(1, _BATCH_TOKENS // per_image),
            fitted=self.tower_samples,
            judging=max(1, math.ceil(self.tower_samples * self.held_out)),
        )
        self._require_work_for_all(len(batches), len(self._decoder_batches))
        visual, ideal = yield from self._tower(batches)
        if not spec.decoder.tied_head:
            yield LinearGroup(names=(spec.decoder.embedding,), moments=None)
        yield from self._decoder(prompts, visual, ideal)

    @cached_property
    def _decoder_batches(self) -> tuple[PromptBatch, ...]:
        return batch_prompts(self.prompts, self.first_held_out, _BATCH_TOKENS)

    def _require_work_for_all(self, *batches: int) -> None:
        most = min(batches)
        if self.ranks.count > most:
            raise CalibrationError(
                f"{self.samples.name}: {len(self.samples)} samples make {most} batches, which "
                f"{self.ranks.count} processes cannot share; start at most {most}, or give more "
                "samples"
            )

    def _width(self, *names: str) -> int:
        """Channels of the input that some linears share."""
        return self.checkpoint.form(names[0]).shape[1]

    def _store(self) -> ActivationStore:
        return ActivationStore(self.spill_folder, device=self.checkpoint.device)

    def _tower(
        self, batches: Sequence[PromptBatch]
    ) -> Generator[Step, None, tuple[VisualTokens, VisualTokens | None]]:
        checkpoint, spec = self.checkpoint, self.checkpoint.spec
        path = PairedActivations(
            now=self._store(), ideal=self._store() if self.carry_float else None
        )
        for batch in self.ranks.own(batches):
            images = [self.samples.samples[index].open_image() for index in batch.samples]
            with torch.no_grad():
                pixels = checkpoint.processor.pixels(images)
                path.append(embed_patches(checkpoint.model, spec, pixels))
        shared = SharedBatches(every=batches, ranks=self.ranks)
        used = [batch if batch.in_tower_moments else None for batch in batches]
        measured = SharedBatches(every=used, ranks=self.ranks)
        entering: dict[int, _Entering] = {}
        tapped: list[PairedActivations] = []
        tokens: list[TowerTokens] = []
        for block in range(spec.tower.feature_block + 1):
            if block in read_blocks(checkpoint):
                entering[block] = _Entering(path=path.copy(), tokens=tokens)
            merge = spec.tower.merge_in(block)
            before = None if merge is None else path.copy()
            for sublayer in tower_sublayers(checkpoint.model, spec, block):
                yield from self._sublayer(sublayer, path, measured, _alike, tokens)
                if merge is not None and before is not None and sublayer.kind == "attention":
                    tokens = self._merge_tokens(merge, before, path, tokens)
                    before.close()
            tapped += [path.copy() for tap in spec.taps if tap.block == block]
        features, indices = self._keep_features(path, tokens, entering)
        path.close()
        for read in entering.values():
            read.path.close()
        visual, ideal = yield from self._project(shared, features, indices, spec.projector.steps)
        for tap, states in zip(spec.taps, tapped, strict=True):
            taken = self._take_features(states, indices)
            states.close()
            rows, wanted = yield from self._project(shared, taken, indices, tap.steps)
            visual = self._beside(visual, rows)
            if ideal is not None and wanted is not None:
                ideal = self._beside(ideal, wanted)
        return visual, ideal

    @torch.no_grad()
    def _take_features(
        self, path: PairedActivations, indices: Sequence[Tensor]
    ) -> PairedActivations:
        """What enters the steps of a tap: the merged states of the tokens that are kept."""
        ops = TorchOps(self.checkpoint.model, self.checkpoint.spec)
        spec = self.checkpoint.spec

        def taken(states: Tensor, chosen: Tensor) -> Tensor:
            hidden = ops.drop_first(states) if spec.tower.has_cls else states
            return ops.take(merged_features(ops, spec.projector, hidden), chosen).contiguous()

        features = PairedActivations(
            now=self._store(), ideal=self._store() if path.ideal is not None else None
        )
        for number, chosen in enumerate(indices):
            features.now.append(taken(path.now[number], chosen))
            if path.ideal is not None and features.ideal is not None:
                features.ideal.append(taken(path.ideal[number], chosen))
        return features

    def _sublayer(
        self,
        sublayer: Sublayer,
        path: PairedActivations,
        batches: SharedBatches,
        weights_at: TokenWeights,
        rows: Sequence[SublayerRows] = (),
        drops_of: DropsOf = lambda _: None,
    ) -> Iterator[Step]:
        """The steps of a sublayer; at the end the path stands after it, and after its drops."""
        checkpoint = self.checkpoint
        originals = {
            name: checkpoint.form(name)
            for name in (*sublayer.first, sublayer.last)
            if path.ideal is not None
        }

        def rows_of(index: int) -> SublayerRows | None:
            return rows[index] if rows else None

        def moments_of_last(block: int | None) -> InputMoments:
            def inputs_of(states: Tensor, index: int) -> Tensor:
                return sublayer.inputs_of_last(states, rows_of(index))

            with self._store() as ideal:
                if path.ideal is not None:
                    # All at once: each pass wants the weights dense, in one of two forms.
                    with (
                        forms_in_place(checkpoint, originals),
                        cache_dense_weights(sublayer.linears),
                    ):
                        for index, batch in enumerate(path.ideal):
                            is_used = batches.own[index] is not None
                            ideal.append(inputs_of(batch, index) if is_used else _NOTHING)
                with cache_dense_weights(sublayer.linears):
                    return measure_moments(
                        path,
                        batches,
                        inputs_of,
                        partial(weights_at, "last"),
                        block,
                        width=self._width(sublayer.last),
                        ideal_inputs=ideal if path.ideal is not None else None,
                    )

        yield LinearGroup(
            names=sublayer.first,
            moments=partial(
                measure_moments,
                path,
                batches,
                lambda states, _: sublayer.normed(states),
                partial(weights_at, "first"),
                width=self._width(*sublayer.first),
            ),
        )
        yield LinearGroup(names=(sublayer.last,), moments=moments_of_last)
        if path.ideal is not None:
            with forms_in_place(checkpoint, originals):
                advance(sublayer, path.ideal, rows_of)
            yield FinishedSublayer(
                sublayer=sublayer,
                inputs=path.now,
                targets=path.ideal,
                rows=rows,
                batches=batches.own,
                weights_of=partial(weights_at, "last"),
            )
        drops = [drops_of(index) for index in range(len(path.now))]
        advance(sublayer, path.now, rows_of)
        path.drop(drops)

    @torch.no_grad()
    def _merge_tokens(
        self,
        merge: TokenMerge,
        entering: PairedActivations,
        path: PairedActivations,
        tokens: Sequence[TowerTokens],
    ) -> list[TowerTokens]:
        """Merges tokens of the tower after the attention of a block; returns what they stand for.

        The float tower might merge others; what is compared are the same ones.
        """
        model, spec = self.checkpoint.model, self.checkpoint.spec
        count, after = spec.tower.tokens_after(merge), []
        for number, before in enumerate(tokens or [None] * len(path.now)):
            states = path.now[number]
            target = match_after(model, spec, merge, entering.now[number], states)
            path.now[number], merged = merge_tokens(states, target, count, before)
            if path.ideal is not None:
                path.ideal[number], _ = merge_tokens(path.ideal[number], target, count, before)
            after.append(merged)
        return after

    @torch.no_grad()
    def _keep_features(
        self,
        path: PairedActivations,
        tokens: Sequence[TowerTokens],
        entering: Mapping[int, _Entering],
    ) -> tuple[PairedActivations, list[Tensor]]:
        """What enters the projector, and which tokens were kept."""
        features = PairedActivations(
            now=self._store(), ideal=self._store() if path.ideal is not None else None
        )
        indices = []
        for number, states in enumerate(path.now):
            stand_for = tokens[number] if tokens else None
            before = {block: read.now(number) for block, read in entering.items()}
            kept, chosen = self._reduce(self._merge(states, stand_for), before)
            features.now.append(kept)
            indices.append(chosen)
            if path.ideal is None or features.ideal is None:
                continue
            merged = self._merge(path.ideal[number], stand_for)
            before = {block: read.ideal(number) for block, read in entering.items()}
            ideal, wanted = self._reduce(merged, before)
            if not torch.equal(wanted, chosen):
                # The float tower would keep other tokens; what is compared are the same ones.
                places = chosen[..., None].expand(-1, -1, merged.shape[-1])
                ideal = merged.gather(1, places)
            features.ideal.append(ideal)
        return features, indices

    def _merge(self, states: Tensor, tokens: TowerTokens | None) -> Tensor:
        """Tower states to what a projector without reduction reads."""
        model, spec = self.checkpoint.model, self.checkpoint.spec
        return tower_features(model, spec, states, tokens).contiguous()

    def _reduce(
        self, features: Tensor, entering: Mapping[int, TowerState]
    ) -> tuple[Tensor, Tensor]:
        """The features that are kept, and their indices."""
        kept, indices = reduce_features(self.checkpoint, features, entering)
        return kept.contiguous(), indices

    def _project(
        self,
        batches: SharedBatches,
        features: PairedActivations,
        indices: Sequence[Tensor],
        steps: Sequence[ProjectorStep],
    ) -> Generator[Step, None, tuple[VisualTokens, VisualTokens | None]]:
        checkpoint = self.checkpoint
        ops = TorchOps(checkpoint.model, checkpoint.spec)
        path = features
        for step in steps:
            names, run = step_linears(step), partial(run_steps, ops, (step,))
            if not names:
                with torch.no_grad():
                    path.apply(run)
                continue
            original = (
                {name: checkpoint.form(name) for name in names} if path.ideal is not None else {}
            )
            yield LinearGroup(
                names=names,
                moments=partial(
                    measure_moments,
                    path,
                    batches,
                    lambda states, _: states,
                    lambda _: None,
                    width=self._width(*names),
                ),
            )
            layers = nn.ModuleList(checkpoint.model.get_submodule(name) for name in names)
            with torch.no_grad():
                ideal_store = self._store() if path.ideal is not None else None
                projected = PairedActivations(now=self._store(), ideal=ideal_store)
                with cache_dense_weights(layers):
                    projected.now.extend(run(batch) for batch in path.now)
                if path.ideal is not None and projected.ideal is not None:
                    with forms_in_place(checkpoint, original), cache_dense_weights(layers):
                        projected.ideal.extend(run(batch) for batch in path.ideal)
            path.close()
            path = projected
        chosen = torch.cat(list(batches.exchange(indices)))
        embeds = join_batches(batches.exchange(path.now), self.spill_folder)
        visual, ideal = VisualTokens(embeds=embeds, indices=chosen), None
        if path.ideal is not None:
            embeds = join_batches(batches.exchange(path.ideal), self.spill_folder)
            ideal = VisualTokens(embeds=embeds, indices=chosen)
        path.close()
        return visual, ideal

    def _decoder(
        self, prompts: Sequence[Prompt], visual: VisualTokens, ideal: VisualTokens | None
    ) -> Iterator[Step]:
        checkpoint, spec = self.checkpoint, self.checkpoint.spec
        every = self._decoder_batches
        batches, own = SharedBatches(every=every, ranks=self.ranks), self.ranks.own(every)
        left: list[RowsLeft] = []
        path = PairedActivations(
            now=self._store(), ideal=self._store() if ideal is not None else None
        )
        for batch in own:
            inputs = self._splice(batch, prompts, visual)
            path.now.append(inputs.embeds)
            if path.ideal is not None and ideal is not None:
                path.ideal.append(self._splice(batch, prompts, ideal).embeds)
            rows = inputs.rows(spec.decoder)
            if rows.added is not None:
                rows = replace(rows, added=join_batches([rows.added], self.spill_folder))
            left.append(RowsLeft.of(rows, inputs.is_visual, inputs.reader))
        weights_of = self._decoder_weights(prompts, own, visual)
        for block in range(spec.decoder.depth):
            attention, ffn = decoder_sublayers(checkpoint.model, spec, block)
            before = [
                drop_rows(checkpoint, block, path.now[index], rows, after_attention=False)
                for index, rows in enumerate(left)
            ]
            path.drop(before)
            left = [
                rows if drop is None else drop.left for drop, rows in zip(before, left, strict=True)
            ]
            yield from self._attention(attention, block, path, batches, left, weights_of)
            weights_at = partial(weights_of, block, "ffn", left)
            yield from self._sublayer(ffn, path, batches, weights_at, [each.rows for each in left])
        norm = checkpoint.model.get_submodule(spec.decoder.norm)
        decoder = spec.decoder

        yield LinearGroup(
            names=(decoder.embedding if decoder.tied_head else decoder.head,),
            moments=partial(
                measure_moments,
                path,
                batches,
                lambda states, _: norm(states),
                # No logits are ever read at the image's tokens.
                lambda index: (~left[index].is_visual).to(torch.float32),
                width=decoder.hidden_size,
            ),
        )
        path.close()

    def _attention(
        self,
        sublayer: Sublayer,
        block: int,
        path: PairedActivations,
        batches: SharedBatches,
        left: list[RowsLeft],
        weights_of: DecoderWeights,
    ) -> Iterator[Step]:
        """The steps of a decoder block's attention; `left` is then what stands after its drops."""
        rows = tuple(left)

        def drops_of(index: int) -> DroppedRows | None:
            # Asked each time: queries and keys that rank may have been replaced meanwhile.
            states = path.now[index]
            return drop_rows(self.checkpoint, block, states, rows[index], after_attention=True)

        def weights_at(position: Literal["first", "last"], index: int) -> Tensor | None:
            weights = weights_of(block, "attention", rows, position, index)
            drop = drops_of(index) if position == "last" else None
            if drop is None:
                return weights
            own = drop.is_left(path.now[index].shape[1]).to(torch.float32)
            return own if weights is None else weights * own

        def note(index: int) -> DroppedRows | None:
            drop = drops_of(index)
            left[index] = rows[index] if drop is None else drop.left
            return drop

        beside = [each.rows for each in rows]
        yield from self._sublayer(sublayer, path, batches, weights_at, beside, note)

    def _decoder_weights(
        self, prompts: Sequence[Prompt], batches: Sequence[PromptBatch], visual: VisualTokens
    ) -> DecoderWeights:
        """How much the rows that a sublayer of the decoder runs count."""
        if self.weighting == "gradient":
            importance = gradient_weights(
                self.checkpoint, prompts, batches, visual, spill_folder=self.spill_folder
            )
            return lambda block, kind, left, position, index: importance.weights(
                block, kind, index, position
            ).gather(1, left[index].columns)
        return lambda _block, _kind, left, _position, index: token_weights(
            self.weighting, self.counts, left[index].is_visual
        )

    def _beside(self, visual: VisualTokens, rows: VisualTokens) -> VisualTokens:
        """The same tokens with further channels."""
        pairs = zip(visual.embeds.split(1), rows.embeds.split(1), strict=True)
        wide = (torch.cat(pair, dim=-1) for pair in pairs)
        embeds = join_batches(wide, self.spill_folder)
        return VisualTokens(embeds=embeds, indices=visual.indices)

    @torch.no_grad()
    def _splice(
        self, batch: PromptBatch, prompts: Sequence[Prompt], visual: VisualTokens
    ) -> DecoderInputs:
        token_ids = torch.tensor([prompts[index].token_ids for index in batch.samples])
        rows = tile_rows(prompts, batch.samples)
        tokens = VisualTokens(embeds=visual.embeds[rows], indices=visual.indices[rows])
        grids = batch_grids(prompts, batch.samples)
        starts = [prompts[index].answer_start for index in batch.samples]
        return embed_prompts(self.checkpoint, token_ids, tokens, grids, answer_starts=starts)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Entering:
    """What entered a block of the tower, batch by batch.

    Attributes:
        path: Hidden states.
        tokens: What their tokens stand for; empty where none was merged.
    """

    path: PairedActivations
    tokens: Sequence[TowerTokens]

    def now(self, number: int) -> TowerState:
        """A batch of the model as it is now."""
        return self._state(self.path.now[number], number)

    def ideal(self, number: int) -> TowerState:
        """A batch of the float model.

        Raises:
            ValueError: It was not carried along.
        """
        if self.path.ideal is None:
            raise ValueError("the float model was not carried along")
        return self._state(self.path.ideal[number], number)

    def _state(self, hidden: Tensor, number: int) -> TowerState:
        return TowerState(hidden=hidden, tokens=self.tokens[number] if self.tokens else None)


def _alike(_position: Literal["first", "last"], _index: int) -> None:
    """All tokens of the tower weigh the same."""
