"""Scenes and questions: deterministic, balanced, and right by an independent route."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from pocketvlm.reference.questions import (
    FORMS,
    QUESTION_KINDS,
    generate_examples,
    questions_about,
    sample_example_scene,
)
from pocketvlm.reference.scenes import (
    CANVAS,
    COLORS,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    object_coverage,
    render,
    sample_scene,
    word_coverage,
)

SPLITS = ("train", "calibration", "evaluation")


def scenes(n, seed=7):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(n)]


def facts(example):
    return example.image.tobytes(), example.question, example.answer, example.kind


def test_a_seed_gives_the_same_examples_every_time():
    first, second = (list(generate_examples(3, 40)) for _ in range(2))
    assert [facts(e) for e in first] == [facts(e) for e in second]


def test_a_longer_run_starts_with_a_shorter_one():
    short, long = list(generate_examples(0, 16)), list(generate_examples(0, 48))
    assert [facts(e) for e in short] == [facts(e) for e in long[:16]]


def test_no_image_is_in_two_splits_or_two_seeds():
    images = [
        example.image.tobytes()
        for split in SPLITS
        for seed in (0, 1)
        for example in generate_examples(seed, 24, split=split)
    ]
    assert len(set(images)) == len(images)


def test_an_unknown_split_and_a_negative_seed_are_refused():
    with pytest.raises(ValueError, match="there are train, calibration, evaluation"):
        next(generate_examples(0, 1, split="test"))
    with pytest.raises(ValueError, match="must not be negative"):
        next(generate_examples(-1, 1))


def test_kinds_follow_each_other_and_answers_are_balanced():
    answers = defaultdict(Counter)
    kinds = []
    for index in range(1600):
        _, question = sample_example_scene(0, index, split="evaluation")
        kinds.append(question.kind)
        answers[question.form.kind, question.form.name][question.answer] += 1
    assert kinds[:16] == [*QUESTION_KINDS, *QUESTION_KINDS]
    for form in FORMS:
        counts = answers[form.kind, form.name]
        assert set(counts) == set(form.answers)
        share = max(counts.values()) / counts.total()
        assert share < 1.0 / len(form.answers) + 0.2


def test_most_patches_show_background_alone():
    for scene in scenes(150):
        covered = sum(object_coverage(thing) for thing in scene.objects)
        if scene.word is not None:
            covered = covered + word_coverage(scene.word)
        assert np.mean(covered == 0) >= 0.6


def test_coverage_is_where_the_pixels_are():
    for scene in scenes(20):
        for thing in scene.objects:
            coverage = object_coverage(thing)
            rows, cols = np.nonzero(coverage > 0.3)
            side = CANVAS // coverage.shape[0]
            pixels = np.asarray(render(scene), dtype=int)
            near = [
                np.abs(pixels[r * side : (r + 1) * side, c * side : (c + 1) * side] - thing.rgb)
                .sum(-1)
                .min()
                for r, c in zip(rows, cols, strict=True)
            ]
            assert max(near, default=0) <= 3


def independent_answer(scene, question):
    """Answers from object centres and words of the question, sharing no code with the grammar."""
    text = question.rstrip("?").replace(" an ", " a ")

    def matching(phrase):
        words = [
            w.removesuffix("s") if w.removesuffix("s") in SHAPES else w for w in phrase.split()
        ]
        return [
            thing
            for thing in scene.objects
            if all(
                w in (thing.color, thing.shape, thing.size)
                for w in words
                if w not in ("object", "objects")
            )
        ]

    def only(phrase):
        (thing,) = matching(phrase)
        return thing

    if m := re.fullmatch(r"is there a (.+)", text):
        return "yes" if matching(m[1]) else "no"
    if m := re.fullmatch(r"how many (.+) are there", text):
        return str(len(matching(m[1])))
    if m := re.fullmatch(r"what color is the (.+)", text):
        return only(m[1]).color
    if m := re.fullmatch(r"what shape is the (.+)", text):
        return only(m[1]).shape
    if m := re.fullmatch(r"is the (.+) small or large", text):
        return "large" if only(m[1]).radius > 10 else "small"
    if m := re.fullmatch(r"where is the (.+)", text):
        thing = only(m[1])
        return ("top " if thing.y < CANVAS / 2 else "bottom ") + (
            "left" if thing.x < CANVAS / 2 else "right"
        )
    if m := re.fullmatch(r"is the (.+) left or right of the (.+)", text):
        return "left" if only(m[1]).x < only(m[2]).x else "right"
    if m := re.fullmatch(r"is the (.+) above or below the (.+)", text):
        return "above" if only(m[1]).y < only(m[2]).y else "below"
    assert text == "what word is written"
    return scene.word.text


def test_every_answer_is_right_by_an_independent_route():
    asked = Counter()
    for scene in scenes(150):
        for form in FORMS:
            for question in questions_about(scene, form):
                assert independent_answer(scene, question.text) == question.answer
                assert question.answer in form.answers or form.kind == "count"
                asked[form.kind, form.name] += 1
    assert len(asked) == len(FORMS)


def test_scenes_stay_inside_what_they_promise():
    for scene in scenes(200):
        assert 1 <= len(scene.objects) <= MAX_OBJECTS
        assert len({(thing.row, thing.col) for thing in scene.objects}) == len(scene.objects)
        for thing in scene.objects:
            assert thing.color in COLORS
            assert thing.size in SIZES
    image = render(scenes(1)[0])
    assert (image.size, image.mode) == ((CANVAS, CANVAS), "RGB")
