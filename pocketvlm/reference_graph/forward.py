"""Runs a checkpoint in torch exactly as the phone will: pixels, k embeddings, splice, decoder.

This is the definition that every exported graph is held to. It runs the sublayers of the phone's
graphs over the modules of a checkpoint, and stock transformers is the oracle that it is held to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import UnsupportedError
from pocketvlm.graph.builders import merged_features, tap_rows
from pocketvlm.graph.token_merging import TowerTokens
from pocketvlm.models.decoder import DecoderSpec
from pocketvlm.models.images.tilings.tile_grid import TileGrid
from pocketvlm.models.projector import run_steps
from pocketvlm.models.spec import ModelSpec
from pocketvlm.prompt.generation_settings import GenerationSettings
from pocketvlm.reference_graph.decoder_rows import DecoderRows
from pocketvlm.reference_graph.kv_cache import KVCache
from pocketvlm.reference_graph.picture_rows import arrange_tiles
from pocketvlm.reference_graph.sublayers import decoder_sublayers
from pocketvlm.reference_graph.torch_ops import TorchOps
from pocketvlm.reference_graph.tower_states import (
    TowerState,
    run_tower_block,
    tower_queries_and_keys,
)
from pocketvlm.reference_graph.visual_schedule import BlockRows, RowsLeft

__all__ = [
    "DecoderInputs",
    "VisualTokens",
    "decode_logits",
    "decoder_states",
    "embed_patches",
    "embed_prompts",
    "embed_text",
    "encode_by_each",
    "encode_features",
    "encode_images",
    "greedy_generate",
    "new_cache",
    "project",
    "read_blocks",
    "reduce_features",
    "split_rows",
    "tower_features",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class VisualTokens:
    """What the vision graph returns.

    Attributes:
        embeds: float32 [images, k, row width], ready for the decoder.
        indices: int64 [images, k]: which of the N unreduced tokens these are, ascending.
    """

    embeds: Tensor
    indices: Tensor

    def by_tile(self, prompts: int) -> list[VisualTokens]:
        """Those of each tile of a prompt, [prompts, k], of prompts that have equally many tiles."""
        pairs = (tokens.unflatten(0, (prompts, -1)).unbind(1) for tokens in self.pair)
        return [
            VisualTokens(embeds=embeds, indices=indices)
            for embeds, indices in zip(*pairs, strict=True)
        ]

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Embeds and indices."""
        return self.embeds, self.indices


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderInputs:
    """A batch of prompts after the splice.

    Attributes:
        embeds: float32 [batch, length, width].
        positions: int64 [batch, length]: rotary positions; [3, batch, length] where pictures have
            other ones on each axis.
        is_visual: bool [batch, length]: which columns came from an image.
        next_position: int64 [batch]: rotary position of the first generated token.
        token_ids: int64 [batch, tokens]: the prompts before the splice; `None` where rows are not
            whole prompts.
        mutual: int64 [batch, length]: numbers of rows that see each other, -1 for others
            (`graph.visibility`); `None` for none.
        added: What the tower adds after the decoder's first blocks, side by side, [batch, length,
            blocks * width]; `None` for nothing.
        reader: int64 [batch]: the last row of each prompt, which ranks its visual rows where a
            schedule drops some; `None` for the last row of all.
    """

    embeds: Tensor
    positions: Tensor
    is_visual: Tensor
    next_position: Tensor
    token_ids: Tensor | None = None
    mutual: Tensor | None = None
    added: Tensor | None = None
    reader: Tensor | None = None

    def to(self, device: torch.device) -> DecoderInputs:
        """The same batch where a model computes; token ids stay in main memory."""

        def moved(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device)

        return replace(
            self,
            embeds=self.embeds.to(device),
            positions=self.positions.to(device),
            is_visual=self.is_visual.to(device),
            next_position=self.next_position.to(device),
            mutual=moved(self.mutual),
            added=moved(self.added),
            reader=moved(self.reader),
        )

    def rows(self, decoder: DecoderSpec, cache: KVCache | None = None) -> DecoderRows:
        """What attention takes beside the embeddings."""
        return DecoderRows.at(decoder, self.positions, cache, mutual=self.mutual, added=self.added)

    @property
    def wide(self) -> Tensor:
        """Rows as a graph takes them, [batch, length, row width]."""
        return self.embeds if self.added is None else torch.cat([self.embeds, self.added], dim=-1)

    def positions_of(self, prompt: int) -> Tensor:
        """Positions of one prompt, int64 [axes, length]."""
        return self.positions[..., prompt, :].reshape(-1, self.positions.shape[-1])


def embed_patches(model: nn.Module, spec: ModelSpec, pixels: Tensor) -> Tensor:
    """What enters the tower's first block: [images, tokens, hidden] from [images, C, S, S]."""
    ops = TorchOps(model, spec)
    kernel = cast("nn.Conv2d", model.get_submodule(spec.tower.patch_embedding))
    hidden = ops.embed_patches(pixels.to(kernel.weight.device))
    norm = spec.tower.pre_norm
    return hidden if norm is None else ops.norm(hidden, norm)


def tower_features(
    model: nn.Module, spec: ModelSpec, hidden: Tensor, tokens: TowerTokens | None = None
) -> Tensor:
    """What the projector reads where no token is dropped, from what leaves the feature block.

    Args:
        model: The model.
        spec: Where its parts are.
        hidden: [images, tokens, hidden], and the features of earlier blocks after it.
        tokens: What the tokens stand for; `None` where none was merged.

    Returns:
        [images, N, C], N the visual tokens of an image.
    """
    ops = TorchOps(model, spec)
    hidden, earlier = hidden.tensor_split([spec.tower.hidden_size], dim=-1)
    if spec.tower.feature_norm is not None:
        hidden = ops.norm(hidden, spec.tower.feature_norm)
    if tokens is not None:
        hidden = tokens.restore(hidden)
    if spec.tower.earlier_features:
        hidden = ops.join_channels(earlier, hidden)
    if spec.tower.has_cls:
        hidden = ops.drop_first(hidden)
    return merged_features(ops, spec.projector, hidden)


def project(model: nn.Module, spec: ModelSpec, features: Tensor) -> Tensor:
    """Tower features [..., C] to decoder embeddings [..., width]."""
    return run_steps(TorchOps(model, spec), spec.projector.steps, features)


def encode_images(checkpoint: Checkpoint, pixels: Tensor) -> VisualTokens:
    """Pixels [images, C, S, S] to k visual tokens per image.

    Tokens are dropped after the merge and before the projector: what is not kept is never
    projected.
    """
    return encode_by_each((checkpoint,), pixels)[0]


def encode_by_each(visions: Sequence[Checkpoint], pixels: Tensor) -> list[VisualTokens]:
    """The same by checkpoints that differ in their token reduction alone: the tower runs once."""
    model, spec = visions[0].model, visions[0].spec
    state = TowerState(hidden=embed_patches(model, spec, pixels))
    read = {block for seen in visions for block in read_blocks(seen)}
    entering: dict[int, TowerState] = {}
    tapped: list[Tensor] = []
    for block in range(spec.tower.feature_block + 1):
        if block in read:
            entering[block] = state
        state = run_tower_block(model, spec, block, state)
        tapped += [state.hidden for tap in spec.taps if tap.block == block]
    return [encode_features(seen, state, entering, tapped) for seen in visions]


def encode_features(
    checkpoint: Checkpoint,
    leaving: TowerState,
    entering: Mapping[int, TowerState],
    tapped: Sequence[Tensor] = (),
) -> VisualTokens:
    """The rest of `encode_images`, from what leaves the feature block.

    Args:
        checkpoint: The model.
        leaving: What left the feature block.
        entering: What entered each of `read_blocks`.
        tapped: What left the blocks that add rows to the decoder, [images, tokens, hidden].

    Raises:
        UnsupportedError: There are such blocks, and what left them is not given.
    """
    model, spec = checkpoint.model, checkpoint.spec
    features = tower_features(model, spec, leaving.hidden, leaving.tokens)
    kept, indices = reduce_features(checkpoint, features, entering)
    embeds = project(model, spec, kept)
    if len(tapped) != len(spec.taps):
        raise UnsupportedError(
            f"{len(spec.taps)} blocks of the tower add rows to the decoder, which are not carried "
            "here"
        )
    ops = TorchOps(model, spec)
    rows = [tap_rows(ops, spec, *pair, indices) for pair in zip(spec.taps, tapped, strict=True)]
    return VisualTokens(embeds=torch.cat([embeds, *rows], dim=-1), indices=indices)


def read_blocks(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Blocks of the tower whose queries and keys the token reduction reads, ascending."""
    reducer = checkpoint.reducer
    if reducer is None:
        return ()
    return (*reducer.earlier_blocks, checkpoint.spec.tower.feature_block)


def reduce_features(
    checkpoint: Checkpoint, features: Tensor, entering: Mapping[int, TowerState]
) -> tuple[Tensor, Tensor]:
    """The features that are kept, and which of the N they are.

    Args:
        checkpoint: The model, with its token reduction.
        features: What `tower_features` returns.
        entering: What entered each of `read_blocks`.
    """
    model, spec = checkpoint.model, checkpoint.spec
    ops = TorchOps(model, spec, reducer=checkpoint.reducer)
    if checkpoint.reducer is None:
        return ops.reduce(features, features, features)

    def heads_of(block: int) -> tuple[Tensor, Tensor]:
        return tower_queries_and_keys(model, spec, block, entering[block].restored)

    *earlier, last = (heads_of(block) for block in read_blocks(checkpoint))
    return ops.reduce(features, *last, earlier)


def embed_text(checkpoint: Checkpoint, token_ids: Tensor) -> Tensor:
    """Rows of text as the embedding graph returns them, [batch, length, row width]."""
    spec = checkpoint.spec
    embeds = checkpoint.model.get_submodule(spec.decoder.embedding)(token_ids)
    return functional.pad(embeds, (0, spec.row_width - embeds.shape[-1]))


def split_rows(spec: ModelSpec, wide: Tensor) -> tuple[Tensor, Tensor | None]:
    """Embeddings, and what the tower adds later, from rows [..., row width]."""
    width = spec.decoder.hidden_size
    return wide[..., :width], wide[..., width:] if spec.taps else None


def embed_prompts(
    checkpoint: Checkpoint,
    token_ids: Tensor,
    visual: VisualTokens | Sequence[VisualTokens] | None,
    grids: Sequence[TileGrid] | None = None,
    *,
    answer_starts: Sequence[int] | None = None,
) -> DecoderInputs:
    """Splices visual tokens into prompts; what counts columns is made in main memory.

    Args:
        checkpoint: The model.
        token_ids: int64 [batch, length]; every image is a run of all its placeholders, or each of
            its tiles is one, and the runs lie in the same columns in every row.
        visual: Tokens of all tiles, row by row, or, where tiles keep different numbers, of each
            tile of a row, [batch, k]; `None` for text alone.
        grids: How the images of a row are cut; may be `None` where tile follows tile.
        answer_starts: Where in each row of `token_ids` an answer follows the prompt; `None` where
            none does.

    Raises:
        ValueError: Rows differ in where their images are, or placeholders and images disagree.
    """
    spec = checkpoint.spec
    embedding = checkpoint.model.get_submodule(spec.decoder.embedding)
    device, token_ids = checkpoint.device, token_ids.cpu()
    batch, length = token_ids.shape
    ends = torch.tensor([length] * batch if answer_starts is None else answer_starts)[:, None]
    kind = spec.decoder.mutual_rows
    if visual is None:
        _image_runs(token_ids, spec.image_token_id, [])
        positions = torch.arange(length).expand(batch, -1)
        return DecoderInputs(
            embeds=embedding(token_ids),
            positions=positions,
            is_visual=torch.zeros_like(positions, dtype=torch.bool),
            next_position=torch.full((batch,), length),
            token_ids=token_ids,
            mutual=None if kind is None else _numbers(kind, positions, ends, None),
        ).to(device)
    tiles = visual.by_tile(batch) if isinstance(visual, VisualTokens) else visual
    images = arrange_tiles(
        checkpoint, [(tile.embeds.to(device), tile.indices.cpu()) for tile in tiles], grids
    )
    runs = _image_runs(token_ids, spec.image_token_id, [image.placeholders for image in images])
    keeps_positions = checkpoint.reducer is None or checkpoint.reducer.positions == "original"
    pieces: list[Tensor] = []
    places: list[Tensor] = []
    flags: list[Tensor] = []
    numbers: list[Tensor] = []
    start, position, grid = 0, 0, spec.position_grid
    for number, run in enumerate((*runs, length)):
        pieces.append(embed_text(checkpoint, token_ids[:, start:run]))
        places.append((position + torch.arange(run - start)).expand(batch, -1))
        flags.append(torch.zeros(batch, run - start, dtype=torch.bool))
        position += run - start
        if kind is not None:
            numbers.append(_numbers(kind, torch.arange(start, run).expand(batch, -1), ends, None))
        if number == len(runs):
            break
        image = images[number]
        count = image.embeds.shape[1]
        pieces.append(image.embeds)
        flags.append(torch.ones(batch, count, dtype=torch.bool))
        if kind is not None:
            numbers.append(_numbers(kind, torch.full((batch, count), run), ends, number))
        start = run + image.placeholders
        if grid is not None:
            places.append(position + torch.from_numpy(grid.offsets(image.indices.numpy())))
            position += grid.advance
        elif keeps_positions:
            places.append(position + image.indices)
            position += image.placeholders
        else:
            places.append((position + torch.arange(count)).expand(batch, -1))
            position += count
    if grid is not None:
        places = [place.expand(3, batch, -1) for place in places]
    embedded, added = split_rows(spec, torch.cat(pieces, dim=1))
    reader = None
    if answer_starts is not None:  # counted from the end: images stand before answers
        reader = torch.tensor(answer_starts) - 1 - (length - embedded.shape[1])
    return DecoderInputs(
        embeds=embedded,
        added=added,
        positions=torch.cat(places, dim=-1),
        is_visual=torch.cat(flags, dim=1),
        next_position=torch.full((batch,), position),
        token_ids=token_ids,
        mutual=torch.cat(numbers, dim=1) if numbers else None,
        reader=reader,
    ).to(device)


def _numbers(
    kind: Literal["tile", "prompt"], columns: Tensor, ends: Tensor, tile: int | None
) -> Tensor:
    """Numbers of rows of text, or of a tile: which rows see each other, -1 for none."""
    if kind == "prompt":
        return torch.where(columns < ends, 0, -1)
    return torch.full_like(columns, -1 if tile is None else tile)


def new_cache(checkpoint: Checkpoint) -> KVCache:
    """An empty cache that keeps what the phone's would."""
    return KVCache(checkpoint.spec.decoder.attention_blocks, checkpoint.cache_grid)


def decoder_states(
    checkpoint: Checkpoint, inputs: DecoderInputs, cache: KVCache | None = None
) -> Tensor:
    """What the head reads, [batch, length, width]: hidden states after the decoder's last norm.

    Rows that the checkpoint's schedule drops (`Checkpoint.visual_schedule`) are neither computed
    nor cached by later layers, and are zero here. What remains equals, for every row that is left,
    a decoder that hides the keys of dropped rows from there on.

    Args:
        checkpoint: The model.
        inputs: The spliced prompt, or one step of generation.
        cache: As `decode_logits` takes it.

    Raises:
        ValueError: Visual rows are dropped, there is a cache, and rows of the batch differ in how
            many are left.
    """
    model, spec = checkpoint.model, checkpoint.spec
    if cache is None and checkpoint.cache_grid is not None:
        cache = new_cache(checkpoint)  # attention reads its own rows from the cache as well
    shares_cache = cache is not None and len(inputs.embeds) > 1
    hidden, rows = inputs.embeds, inputs.rows(spec.decoder, cache)
    left = RowsLeft.of(rows, inputs.is_visual, inputs.reader)
    for block in range(spec.decoder.depth):
        attention, ffn = decoder_sublayers(model, spec, block)
        run = BlockRows.of(checkpoint, block, hidden, left)
        middle = attention.output(run.entering(hidden), run.attention.rows)
        hidden, left = run.between(middle), run.ffn
        if shares_cache and bool(left.is_filler.any()):
            raise ValueError("rows of one batch must have equally many rows left to share a cache")
        if not hidden.shape[1]:
            return hidden.new_zeros(inputs.embeds.shape)  # later layers have nothing to compute
        hidden = ffn.output(hidden, left.rows)
    hidden = TorchOps(model, spec).norm(hidden, spec.decoder.norm)
    if hidden.shape[1] == inputs.embeds.shape[1]:
        return hidden
    hidden = hidden.masked_fill(left.is_filler[..., None], 0.0)
    places = left.columns[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.new_zeros(inputs.embeds.shape).scatter(1, places, hidden)


def decode_logits(
    checkpoint: Checkpoint,
    inputs: DecoderInputs,
    cache: KVCache | None = None,
    *,
    last_only: bool = False,
    columns: Tensor | None = None,
) -> Tensor:
    """Logits of the decoder, [batch, length, vocabulary], or of fewer columns.

    Args:
        checkpoint: The model.
        inputs: The spliced prompt, or one step of generation.
        cache: What `new_cache` made, extended in place; `None` to compute all of `inputs` at once.
        last_only: Whether only the last column is needed.
        columns: int64 [batch, m]: which columns are needed; the head runs on these alone, so that
            prompts padded on the right can share a batch at no cost.

    Raises:
        ValueError: Only the last column is needed, and it is visual where visual rows are dropped.
    """
    drops = checkpoint.visual_schedule is not None
    if last_only and drops and bool(inputs.is_visual[:, -1].any()):
        raise ValueError("the last column is visual, and visual rows are dropped on the way")
    hidden = decoder_states(checkpoint, inputs, cache)
    if last_only:
        hidden = hidden[:, -1:]
    if columns is not None:
        hidden = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
    return cast("Tensor", checkpoint.model.get_submodule(checkpoint.spec.decoder.head)(hidden))


def greedy_generate(
    checkpoint: Checkpoint,
    inputs: DecoderInputs,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int] = (),
    settings: GenerationSettings | None = None,
) -> list[list[int]]:
    """Greedy continuation of every row, end-of-answer tokens left out.

    Args:
        checkpoint: The model.
        inputs: The spliced prompts.
        max_new_tokens: Tokens after which an answer is cut.
        eos_token_ids: A row stops at the first of these; none always generates `max_new_tokens`.
        settings: What else decides the next token; `None` for the model's own.

    Raises:
        ValueError: There are settings, and `inputs` does not tell the tokens of the prompts.
    """
    settings = checkpoint.processor.generation if settings is None else settings
    prompts: list[list[int]] = []
    if not settings.is_plain:
        if inputs.token_ids is None:
            raise ValueError("settings that change answers need the tokens of the prompts")
        prompts = inputs.token_ids.tolist()
    embedding = checkpoint.model.get_submodule(checkpoint.spec.decoder.embedding)
    cache = new_cache(checkpoint)
    batch = inputs.embeds.shape[0]
    answers: list[list[int]] = [[] for _ in range(batch)]
    open_rows = torch.ones(batch, dtype=torch.bool)
    step, position = inputs, inputs.next_position
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            logits = decode_logits(checkpoint, step, cache, last_only=True)[:, -1]
            if prompts:
                logits = _adjusted(logits, settings, prompts, answers)
            chosen = logits.argmax(dim=-1)
            for row in range(batch):
                if not open_rows[row]:
                    continue
                token = int(chosen[row])
                if token in eos_token_ids:
                    open_rows[row] = False
                else:
                    answers[row].append(token)
            if not bool(open_rows.any()):
                break
            step = DecoderInputs(
                embeds=embedding(chosen[:, None]),
                positions=position[:, None],
                is_visual=torch.zeros(batch, 1, dtype=torch.bool, device=chosen.device),
                next_position=position + 1,
            )
            position = position + 1
    return answers


def _adjusted(
    logits: Tensor,
    settings: GenerationSettings,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> Tensor:
    """Logits of every row after the settings, by the code that a bundle's runtime runs."""
    rows = zip(logits.float().cpu().numpy(), prompts, answers, strict=True)
    return torch.from_numpy(np.stack([settings.adjust(*row) for row in rows]))


def _image_runs(token_ids: Tensor, image_token_id: int, lengths: Sequence[int]) -> list[int]:
    """First columns of the runs of placeholders, the same in every row."""
    is_image = token_ids == image_token_id
    if not bool((is_image == is_image[:1]).all()):
        raise ValueError("rows of one batch must have their images in the same columns")
    columns = is_image[0].nonzero().flatten().tolist()
    firsts = accumulate(lengths[:-1], initial=0) if lengths else ()
    runs = [columns[first] for first in firsts if first < len(columns)]
    ranges = (range(run, run + length) for run, length in zip(runs, lengths, strict=False))
    if columns != list(chain.from_iterable(ranges)):
        raise ValueError(f"{len(columns)} image placeholders are not runs of {list(lengths)}")
    return runs
