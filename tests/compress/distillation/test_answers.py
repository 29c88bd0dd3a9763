"""Batches of answers: padding changes nothing, and every sample comes once an epoch."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from pocketvlm.calibration.data.prompts import encode_samples
from pocketvlm.calibration.source import CalibrationSet, Sample
from pocketvlm.compress.distillation.answers import (
    answer_states,
    make_batch,
    ordered_batches,
    shuffled_batches,
)
from pocketvlm.compress.distillation.losses import (
    answer_cross_entropy,
    feature_distance,
    logit_divergence,
)
from pocketvlm.compress.tokens.stage import ReduceTokens
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError
from pocketvlm.reference_graph.forward import (
    VisualTokens,
    decode_logits,
    embed_prompts,
    encode_images,
)


@pytest.mark.parametrize("reduces", [False, True])
@torch.no_grad()
def test_padded_prompts_see_what_each_sees_alone(tiny_checkpoint, reduces: bool) -> None:
    samples = CalibrationSet.from_reference(0, 6)
    if reduces:
        stage = ReduceTokens(keep=0.5)
        tiny_checkpoint = stage.apply(tiny_checkpoint, samples, RunContext())
    prompts = encode_samples(tiny_checkpoint.processor, samples)
    assert len({len(prompt.token_ids) for prompt in prompts}) > 1
    pixels = tiny_checkpoint.processor.pixels([s.open_image() for s in samples])
    visual = encode_images(tiny_checkpoint, pixels)
    batch = make_batch(prompts, range(6))
    head = tiny_checkpoint.layer(tiny_checkpoint.spec.decoder.head)
    found = head(answer_states(tiny_checkpoint, batch, visual))
    removed = tiny_checkpoint.spec.visual_tokens - visual.embeds.shape[1]
    start = 0
    for row, prompt in enumerate(prompts):
        alone = VisualTokens(embeds=visual.embeds[[row]], indices=visual.indices[[row]])
        token_ids = torch.tensor([prompt.token_ids])
        logits = decode_logits(tiny_checkpoint, embed_prompts(tiny_checkpoint, token_ids, alone))[0]
        answer = range(prompt.answer_start, prompt.answer_end)
        wanted = torch.stack([logits[column - 1 - removed] for column in answer])
        stop = start + len(answer)
        torch.testing.assert_close(found[start:stop], wanted, rtol=1e-4, atol=1e-4)
        assert batch.labels[start:stop].tolist() == [prompt.token_ids[c] for c in answer]
        assert float(batch.shares[start:stop].sum()) == pytest.approx(1)
        start = stop
    assert start == len(found)


def test_an_answer_is_needed(tiny_checkpoint) -> None:
    picture = CalibrationSet.from_reference(0, 1).samples[0].image
    silent = Sample(image=picture, question="What is it?", answer=" ", where="data.jsonl:7")
    prompts = encode_samples(
        tiny_checkpoint.processor, CalibrationSet(name="silent", samples=(silent,))
    )
    with pytest.raises(CalibrationError, match="data.jsonl:7: has no answer"):
        make_batch(prompts, [0])


def test_every_sample_comes_once_an_epoch_in_an_order_of_the_seed(tiny_checkpoint) -> None:
    prompts = encode_samples(tiny_checkpoint.processor, CalibrationSet.from_reference(0, 10))
    samples = range(1, 10)
    first = list(islice(shuffled_batches(prompts, samples, 4, 5), 6))
    again = list(islice(shuffled_batches(prompts, samples, 4, 5), 6))
    other = list(islice(shuffled_batches(prompts, samples, 4, 6), 6))
    assert first == again != other
    for epoch in (first[:3], first[3:]):
        assert sorted(index for batch in epoch for index in batch) == list(samples)
    assert first[:3] != first[3:]
    assert list(ordered_batches(prompts, samples, 4)) == [(1, 2, 3, 4), (5, 6, 7, 8), (9,)]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_losses_are_those_of_the_textbook(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64) * 3
    labels = torch.tensor([0, 3, 8, 2, 2])
    shares = torch.tensor([0.5, 0.5, 1.0, 0.25, 0.75], dtype=torch.float64)
    divergence = entropy = distance = 0.0
    for t in range(5):
        p = [float((v / temperature).exp()) for v in teacher[t]]
        q = [float((v / temperature).exp()) for v in student[t]]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        each = sum(a * (torch.tensor(a / b).log().item()) for a, b in zip(p, q, strict=True))
        divergence += temperature**2 * float(shares[t]) * each
        plain = [float(v.exp()) for v in student[t]]
        entropy -= float(shares[t]) * float(torch.tensor(plain[labels[t]] / sum(plain)).log())
        error = sum(float(a - b) ** 2 for a, b in zip(teacher[t], student[t], strict=True))
        distance += float(shares[t]) * error / sum(float(a) ** 2 for a in teacher[t])
    found = logit_divergence(teacher, student, shares, temperature)
    assert float(found) == pytest.approx(divergence, rel=1e-5)
    assert float(answer_cross_entropy(student, labels, shares)) == pytest.approx(entropy, rel=1e-5)
    assert float(feature_distance(teacher, student, shares)) == pytest.approx(distance)
    assert float(logit_divergence(teacher, teacher, shares, temperature)) == 0
