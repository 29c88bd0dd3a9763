"""Perplexity as transformers has it, and intervals that hold what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from benchmarks.perplexity_rows import Judged, compare, judge, perplexity
from pocketvlm.calibration.data.prompts import encode_samples
from pocketvlm.calibration.source import CalibrationSet, Sample
from pocketvlm.checkpoint import Checkpoint
from tests.stock import stock_of


def judged(losses, tokens=4):
    return Judged(losses=tuple(losses), tokens=(tokens,) * len(losses))


def test_losses_are_those_of_transformers(tiny_checkpoint: Checkpoint):
    rng = np.random.default_rng(0)
    texts = ("a red square", "nothing", "two blue circles")
    samples = CalibrationSet(
        name="test",
        samples=tuple(
            Sample(
                image=Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)),
                question="what is it?",
                answer=text,
            )
            for text in texts
        ),
    )
    found = judge(tiny_checkpoint, samples)
    stock, is_llava = stock_of(tiny_checkpoint), tiny_checkpoint.spec.family == "llava"
    for number, (sample, prompt) in enumerate(
        zip(samples, encode_samples(tiny_checkpoint.processor, samples), strict=True)
    ):
        pixels = tiny_checkpoint.processor.pixels([sample.open_image()])
        ids = torch.tensor([prompt.token_ids])
        logits = stock(input_ids=ids, pixel_values=pixels if is_llava else pixels[None]).logits[0]
        last = prompt.answer_end - 1  # without the token that ends the answer
        expected = functional.cross_entropy(
            logits[prompt.answer_start - 1 : last - 1], ids[0, prompt.answer_start : last]
        )
        assert found.tokens[number] == last - prompt.answer_start
        assert found.losses[number] / found.tokens[number] == pytest.approx(
            float(expected.detach()), rel=1e-5
        )


def test_a_constant_ratio_has_no_width():
    base = judged([3.0, 8.0, 1.0, 5.0])
    worse = judged([loss + 4 * math.log(1.5) for loss in base.losses])
    assert compare([worse], [base]) == pytest.approx((1.5, 1.5, 1.5))
    assert compare([worse, worse], [base]) == pytest.approx((1.5, 1.5, 1.5))
    value, low, high = perplexity([base])
    assert value == pytest.approx(math.exp(17 / 16))
    assert low < value < high


def test_sets_that_differ_widen_the_interval():
    base, noise = judged([4.0] * 30), np.random.default_rng(0).normal(0, 0.1, 30)
    near = [judged(4.2 + noise), judged(4.2 + noise)]
    apart = [judged(3.8 + noise), judged(4.6 + noise)]
    _, low, high = compare(near, [base])
    value, lower, higher = compare(apart, [base])
    assert value == pytest.approx(compare(near, [base])[0])
    assert lower < low < value < high < higher


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(20):
        shared = rng.normal(4, 1, 40)  # hard pieces are hard for both
        base, other = judged(shared), judged(shared + rng.normal(0.2, 0.4, 40))
        _, low, high = compare([other], [base])
        held += low <= math.exp(0.2 / 4) <= high
        assert high / low < 1.12  # unpaired it would be 1.25
    assert held >= 17
