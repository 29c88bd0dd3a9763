"""Trains `pocket-tiles`: ``python -m pocketvlm.reference.tiles --work FOLDER``.

It starts from `pocket-smol`, whose tower reads a scene of the size of a tile, and learns what tiles
are for: markers, several runs of visual tokens, and where in the whole picture something lies.
Tower and connector stay as they are, so what they say of every tile is computed once. One mosaic in
four is shown as a whole alone, so that the model without tiles is as good as its pixels allow.
Run the same command again to resume.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it
from torch import Tensor
from transformers import AutoModelForImageTextToText

from pocketvlm.models.images.tilings.tile_grid import ONE_TILE, TileGrid
from pocketvlm.processor.foreign_code import STOCK_ONLY
from pocketvlm.prompt.picture_text import PictureText
from pocketvlm.reference import reference_model_path
from pocketvlm.reference.architecture import VISUAL_TOKENS, build_model, build_processor
from pocketvlm.reference.forward import decode_packed, packed_bias
from pocketvlm.reference.mosaics import render_mosaic, sample_mosaic_example
from pocketvlm.reference.packing import (
    IGNORED,
    choose_questions,
    pack_questions,
    picture_prefix,
)
from pocketvlm.reference.tokenizer import DIALECTS, IMAGE_ID, build_tokenizer
from pocketvlm.reference.train import make_optimizer, save_model, save_state, take_step

__all__ = ["Group", "main", "make_groups", "start_model"]

_NAME, _ORIGIN = "pocket-tiles", "pocket-smol"
_TURNS = 176
"""Tokens of questions and answers after a picture."""
_QUESTIONS = 20
_WHOLE_ALONE = 4
"""One mosaic in this many is not cut."""
_SAVE_EVERY = 100


@dataclass(frozen=True, kw_only=True)
class Group:
    """Mosaics that are cut alike.

    Attributes:
        features: What tower and connector say of the tiles, bfloat16 [mosaics, tokens, hidden].
        packs: int64 [mosaics, 4, length]: tokens, targets, segments and positions.
    """

    features: Tensor
    packs: Tensor


def start_model() -> Any:
    """`pocket-smol` with the vocabulary of `pocket-tiles`: words keep their vectors."""
    origin = AutoModelForImageTextToText.from_pretrained(
        reference_model_path(_ORIGIN), dtype=torch.float32, **STOCK_ONLY
    )
    model = build_model(_NAME)
    state = origin.state_dict()
    old, new = (build_tokenizer(name).get_vocab() for name in (_ORIGIN, _NAME))
    for key in [key for key in state if key.endswith(("embed_tokens.weight", "lm_head.weight"))]:
        table = state[key]
        rows = table[old["<global-img>"]].repeat(DIALECTS[_NAME].vocabulary_size, 1)
        for word, index in new.items():
            if word in old:
                rows[index] = table[old[word]]
        # Markers begin alike but for their directions, which training pulls apart.
        noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
        unknown = torch.tensor([index for word, index in new.items() if word not in old])
        rows[unknown] += 0.3 * table.std() * noise[unknown]
        state[key] = rows
    model.load_state_dict(state)
    return model


@torch.no_grad()
def make_groups(model: Any, seed: int, count: int) -> dict[TileGrid, Group]:
    """Mosaics of the training split, drawn, cut, seen and packed."""
    processor = build_processor(_NAME)
    dialect = DIALECTS[_NAME]
    prefix, suffix = dialect.placeholder
    text = PictureText(
        placeholder="<image>",
        count=VISUAL_TOKENS,
        prefix=prefix,
        suffix=suffix,
        tile_marker=dialect.tile_marker,
    )
    features: dict[TileGrid, list[Tensor]] = {}
    packs: dict[TileGrid, list[Any]] = {}
    for number in range(count):
        mosaic, first = sample_mosaic_example(seed, number, split="train")
        rng = np.random.default_rng((seed, number))
        questions = [first, *choose_questions(mosaic.whole, rng, _QUESTIONS)]
        is_whole = number % _WHOLE_ALONE == 0
        grid = ONE_TILE if is_whole else TileGrid(rows=mosaic.rows, columns=mosaic.columns)
        pixels = processor.image_processor(
            images=[render_mosaic(mosaic)],
            do_image_splitting=not is_whole,
            return_tensors="pt",
        )["pixel_values"]
        seen = model.model.get_image_features(pixels).pooler_output
        rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in seen])
        features.setdefault(grid, []).append(rows.bfloat16())
        start = picture_prefix(_NAME, text.write(grid))
        pack = pack_questions(questions, rng, _NAME, start, len(start) + _TURNS)
        packs.setdefault(grid, []).append(
            np.stack([pack.tokens, pack.targets, pack.segments, pack.positions])
        )
        if (number + 1) % 500 == 0:
            print(f"mosaics {number + 1}", flush=True)
    return {
        grid: Group(
            features=torch.stack(features[grid]),
            packs=torch.from_numpy(np.stack(packs[grid])).long(),
        )
        for grid in features
    }


def _batches(groups: dict[TileGrid, Group], batch: int, seed: int) -> Iterator[tuple[Any, Any]]:
    """Rows of one group at a time, groups in proportion to their size, for ever."""
    rng = np.random.default_rng(seed)
    ordered = sorted(groups.items(), key=lambda item: (item[0].rows, item[0].columns))
    while True:
        chunks = []
        for grid, group in ordered:
            order = rng.permutation(len(group.packs))
            whole = order[: len(order) // batch * batch].reshape(-1, batch)
            chunks += [(grid, rows) for rows in whole]
        for index in rng.permutation(len(chunks)):
            grid, rows = chunks[index]
            yield groups[grid], torch.from_numpy(rows)


def _loss(model: Any, group: Group, rows: Tensor) -> tuple[Tensor, float]:
    decoder = model.model.text_model
    tokens, targets, segments, positions = group.packs[rows].unbind(1)
    embedded = decoder.embed_tokens(tokens)
    # Every row of a group has its placeholders in the same columns.
    columns = (tokens[0] == IMAGE_ID).nonzero().flatten()
    states = embedded.index_copy(1, columns, group.features[rows].to(embedded.dtype))
    cos, sin = decoder.rotary_emb(states, positions)
    states = decode_packed(decoder, states, packed_bias(segments), cos, sin)
    asked = targets != IGNORED
    logits = model.lm_head(states[asked]).float()
    loss = F.cross_entropy(logits, targets[asked])
    return loss, float((logits.argmax(-1) == targets[asked]).float().mean())


def _train(options: argparse.Namespace) -> Any:
    torch.manual_seed(options.seed)
    model = start_model()
    model.requires_grad_(requires_grad=False)
    model.model.text_model.requires_grad_(requires_grad=True)
    data = options.work / f"mosaics-{options.seed}-{options.mosaics}.pt"
    if not data.exists():
        torch.save(
            {
                (grid.rows, grid.columns): (group.features, group.packs)
                for grid, group in make_groups(model, options.seed, options.mosaics).items()
            },
            data,
        )
    groups = {
        TileGrid(rows=rows, columns=columns): Group(features=features, packs=packs)
        for (rows, columns), (features, packs) in torch.load(data, weights_only=True).items()
    }
    optimizer = make_optimizer(model, {"": 1.0}, options.rate)
    file, step = options.work / "tiles.pt", 0
    batches = _batches(groups, options.batch, options.seed)
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        for _ in range(step):
            next(batches)
    began, shown = time.perf_counter(), []
    while step < options.steps:
        with torch.autocast("cpu", torch.bfloat16):
            loss, right = _loss(model, *next(batches))
        take_step(optimizer, loss, step, options.steps, name=_NAME)
        step += 1
        shown.append((float(loss.detach()), right))
        if step % 20 == 0:
            means = np.mean(shown, axis=0)
            seconds = time.perf_counter() - began
            print(f"{step} loss {means[0]:.4f} right {means[1]:.4f} {seconds:.0f} s", flush=True)
            shown.clear()
        if step % _SAVE_EVERY == 0 or step == options.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(file, {**state, "step": step})
    return model


def main() -> None:
    """Trains the model and writes it to FOLDER/pocket-tiles."""
    parser = argparse.ArgumentParser(prog="pocketvlm.reference.tiles", description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--mosaics", type=int, default=3200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    save_model(_train(options), _NAME, options.work / _NAME)


if __name__ == "__main__":
    main()
