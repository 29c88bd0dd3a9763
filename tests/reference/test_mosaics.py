"""Mosaics: questions about them are right by an independent route, and tiles show their scenes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pocketvlm.reference.mosaics import (
    GENERATORS,
    generate_mosaic_examples,
    render_mosaic,
    sample_mosaic_example,
)
from pocketvlm.reference.questions import QUESTION_KINDS
from pocketvlm.reference.scenes import CANVAS, GRID, MAX_OBJECTS, render


def drawn(count, seed=5):
    return [sample_mosaic_example(seed, index, split="evaluation") for index in range(count)]


def facts(example):
    return example.image.tobytes(), example.question, example.answer, example.kind


def test_a_seed_gives_the_same_examples_and_a_longer_run_starts_with_a_shorter_one():
    short, long = list(generate_mosaic_examples(3, 16)), list(generate_mosaic_examples(3, 40))
    assert [facts(e) for e in short] == [facts(e) for e in long[:16]]
    assert Counter(e.kind for e in long) == dict.fromkeys(QUESTION_KINDS, 5)


def test_no_picture_is_in_two_splits_or_two_kinds_of_pictures():
    images = [
        example.image.tobytes()
        for generate in GENERATORS.values()
        for split in ("train", "calibration", "evaluation")
        for example in generate(0, 24, split=split)
    ]
    assert len(set(images)) == len(images)


def test_every_tile_of_the_picture_is_a_scene():
    for mosaic, _ in drawn(12):
        pixels = np.asarray(render_mosaic(mosaic))
        assert pixels.shape == (CANVAS * mosaic.rows, CANVAS * mosaic.columns, 3)
        for index, scene in enumerate(mosaic.scenes):
            row, column = (CANVAS * place for place in divmod(index, mosaic.columns))
            tile = pixels[row : row + CANVAS, column : column + CANVAS]
            assert np.array_equal(tile, np.asarray(render(scene)))


def test_objects_are_few_and_words_are_one():
    for mosaic, _ in drawn(64):
        assert 1 <= sum(len(scene.objects) for scene in mosaic.scenes) <= MAX_OBJECTS
        assert sum(scene.word is not None for scene in mosaic.scenes) <= 1


def test_places_are_those_of_the_whole_picture():
    for mosaic, _ in drawn(64):
        width, height = CANVAS * mosaic.columns, CANVAS * mosaic.rows
        things = [
            (thing, *divmod(index, mosaic.columns))
            for index, scene in enumerate(mosaic.scenes)
            for thing in scene.objects
        ]
        for (thing, row, column), placed in zip(things, mosaic.whole.objects, strict=True):
            assert placed.col == int((column * CANVAS + thing.x) * GRID // width)
            assert placed.row == int((row * CANVAS + thing.y) * GRID // height)


@pytest.mark.parametrize("kind", ["word", "count", "position"])
def test_answers_are_right_by_looking_at_the_scenes(kind):
    for mosaic, question in drawn(160):
        if question.kind != kind:
            continue
        things = [
            (thing, *divmod(index, mosaic.columns))
            for index, scene in enumerate(mosaic.scenes)
            for thing in scene.objects
        ]
        if kind == "word":
            (word,) = (scene.word.text for scene in mosaic.scenes if scene.word is not None)
            assert question.answer == word
        elif kind == "count" and "objects are there" in question.text:
            named = question.text.removeprefix("how many ").removesuffix(" objects are there?")
            found = [t for t, _, _ in things if named in ("objects are there?", t.color)]
            assert question.answer == str(len(found))
        elif kind == "position":
            said = question.text.removeprefix("where is the ").removesuffix("?")
            ((thing, row, column),) = (
                found
                for found in things
                if said in (found[0].shape, f"{found[0].color} {found[0].shape}")
            )
            top = (row * CANVAS + thing.y) / (CANVAS * mosaic.rows) < 0.5
            left = (column * CANVAS + thing.x) / (CANVAS * mosaic.columns) < 0.5
            expected = f"{'top' if top else 'bottom'} {'left' if left else 'right'}"
            assert question.answer == expected
