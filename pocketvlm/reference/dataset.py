"""The training scenes, rendered, labelled and packed once, in shards of plain arrays.

Shards are made by background processes while training reads those that are ready, and each depends
on its own index alone: a run that is interrupted finds what is there and makes what is missing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.reference.packing import choose_questions, pack_questions
from pocketvlm.reference.questions import sample_example_scene
from pocketvlm.reference.scenes import (
    COLORS,
    PATCH_GRID,
    SHAPES,
    SIZES,
    WORDS,
    Scene,
    object_coverage,
    render,
    word_coverage,
)
from pocketvlm.reference.tokenizer import SCENE_DIALECTS

__all__ = [
    "ATTRIBUTES",
    "CONTENT_SIZE",
    "SHARD_SIZE",
    "Shard",
    "load_shard",
    "make_shard",
    "patch_labels",
    "scene_content",
]

SHARD_SIZE = 2048
_QUESTIONS_PER_SCENE = 16  # more than fit

ATTRIBUTES: tuple[str, ...] = (*COLORS, *SHAPES, *SIZES, "object", *WORDS)
"""What a patch can show. "object" marks the patch of an object's centre: objects can be counted."""
_INDEX = {name: index for index, name in enumerate(ATTRIBUTES)}
_FULL_COVERAGE = 0.25  # a patch covered this much shows its object as well as any other

_COLOR_NAMES = tuple(COLORS)
CONTENT_SIZE = len(COLORS) * len(SHAPES) + 4 * len(COLORS) + 4 * len(SHAPES) + len(WORDS)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Arrays of ``SHARD_SIZE`` rows.

    Attributes:
        images: uint8 pixels.
        labels: How much of each attribute each patch shows, 0 to 255.
        contents: What is in the scene as a whole, 0 or 1.
        packs: For every dialect tokens, targets, segments and positions, stacked.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    contents: NDArray[np.uint8]
    packs: dict[str, NDArray[np.int16]]


def patch_labels(scene: Scene) -> NDArray[np.uint8]:
    """How much of each of ``ATTRIBUTES`` every patch shows, as ``(patches, attributes)`` bytes."""
    labels = np.zeros((PATCH_GRID, PATCH_GRID, len(ATTRIBUTES)), dtype=np.float32)
    side = 128 // PATCH_GRID
    for thing in scene.objects:
        shown = np.minimum(object_coverage(thing) / _FULL_COVERAGE, 1)
        for name in (thing.color, thing.shape, thing.size):
            labels[..., _INDEX[name]] = np.maximum(labels[..., _INDEX[name]], shown)
        labels[int(thing.y) // side, int(thing.x) // side, _INDEX["object"]] = 1
    if scene.word is not None:
        labels[..., _INDEX[scene.word.text]] = np.minimum(
            word_coverage(scene.word) / _FULL_COVERAGE, 1
        )
    return np.round(labels * 255).astype(np.uint8).reshape(PATCH_GRID**2, -1)


def scene_content(scene: Scene) -> NDArray[np.uint8]:
    """What is in a scene: pairs of colour and shape, both by quadrant, and the word."""
    pairs = np.zeros((len(COLORS), len(SHAPES)), dtype=np.uint8)
    colors = np.zeros((4, len(COLORS)), dtype=np.uint8)
    shapes = np.zeros((4, len(SHAPES)), dtype=np.uint8)
    words = np.zeros(len(WORDS), dtype=np.uint8)
    for thing in scene.objects:
        color, shape = _COLOR_NAMES.index(thing.color), SHAPES.index(thing.shape)
        quadrant = 2 * (thing.row // 2) + thing.col // 2
        pairs[color, shape] = colors[quadrant, color] = shapes[quadrant, shape] = 1
    if scene.word is not None:
        words[WORDS.index(scene.word.text)] = 1
    return np.concatenate([pairs.ravel(), colors.ravel(), shapes.ravel(), words])


def make_shard(folder: Path, seed: int, index: int) -> Path:
    """Makes shard ``index`` unless it is there, and returns its path."""
    path = folder / f"shard-{seed}-{index:03d}.npz"
    if path.exists():
        return path
    images, labels, contents = [], [], []
    packs: dict[str, list[NDArray[np.int16]]] = {dialect: [] for dialect in SCENE_DIALECTS}
    for row in range(SHARD_SIZE):
        number = index * SHARD_SIZE + row
        scene, first = sample_example_scene(seed, number, split="train")
        rng = np.random.default_rng((seed, number))
        questions = [first, *choose_questions(scene, rng, _QUESTIONS_PER_SCENE)]
        images.append(np.asarray(render(scene)))
        labels.append(patch_labels(scene))
        contents.append(scene_content(scene))
        for dialect, rows in packs.items():
            pack = pack_questions(questions, rng, dialect)
            rows.append(np.stack([pack.tokens, pack.targets, pack.segments, pack.positions]))
    aside = path.with_suffix(f".{os.getpid()}.tmp.npz")
    arrays: dict[str, Any] = {dialect: np.stack(rows) for dialect, rows in packs.items()}
    arrays |= {
        "images": np.stack(images),
        "labels": np.stack(labels),
        "contents": np.stack(contents),
    }
    np.savez(aside, allow_pickle=False, **arrays)
    aside.rename(path)
    return path


def load_shard(path: Path) -> Shard:
    """Reads a shard."""
    with np.load(path) as arrays:
        return Shard(
            images=arrays["images"],
            labels=arrays["labels"],
            contents=arrays["contents"],
            packs={dialect: arrays[dialect] for dialect in SCENE_DIALECTS},
        )
