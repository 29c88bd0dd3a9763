"""Taylor importance against gradients of the whole model, sample by sample, in plain loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from pocketvlm.calibration.data.prompts import encode_samples
from pocketvlm.calibration.gradients.layer_gradients import LayerGradient
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.width.channels import unit_groups
from pocketvlm.compress.pruning.width.taylor import GradientMeans, Taylor, taylor_elements
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError
from pocketvlm.reference_graph.forward import decode_logits, embed_prompts, encode_images
from pocketvlm.weights.modules import FormLinear

ORDERS = ("first", "second", "mix")
CONTEXT = RunContext(threads=1)


def textbook(w: float, gradients: list[float], order: str) -> float:
    """The element's saliency from its gradients, one per sample."""
    g = sum(gradients) / len(gradients)
    fisher = sum(value**2 for value in gradients) / len(gradients)
    return abs(
        {"first": w * g, "second": w * fisher * w, "mix": w * g - 0.5 * w * fisher * w}[order]
    )


@pytest.mark.parametrize("order", ORDERS)
def test_elements(order: str):
    weight = torch.randn(3, 4, dtype=torch.float64)
    gradients = torch.randn(5, 3, 4, dtype=torch.float64)
    found = taylor_elements(weight, gradients.mean(0), gradients.square().mean(0), order)
    for i in range(3):
        for j in range(4):
            expected = textbook(float(weight[i, j]), gradients[:, i, j].tolist(), order)
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-12)


def test_means_depend_neither_on_batches_nor_on_repetition():
    inputs, outputs = torch.randn(6, 7, 4), torch.randn(6, 7, 3)

    def means(parts: list[slice]) -> GradientMeans:
        found = GradientMeans()
        for part in parts:
            samples = tuple(range(6)[part])
            step = LayerGradient(
                name="x", samples=samples, inputs=inputs[part], outputs=outputs[part], is_last=False
            )
            found.add(step)
        return found

    once = means([slice(0, 6)])
    thrice = means([slice(0, 2), slice(2, 6)] * 3)
    assert (once.samples, thrice.samples) == (6, 18)
    for parameter in ("weight", "bias"):
        for a, b in zip(once.of(parameter), thrice.of(parameter), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    gradient, fisher = once.of("weight")
    own = [outputs[n].double().T @ inputs[n].double() for n in range(6)]
    torch.testing.assert_close(gradient.double(), sum(own) / 6, rtol=1e-4, atol=1e-5)
    squares = sum(one.square() for one in own) / 6
    torch.testing.assert_close(fisher.double(), squares, rtol=1e-4, atol=1e-5)


def test_squares_that_were_not_kept_are_missed():
    with pytest.raises(ValueError, match="needs the mean of squared gradients"):
        taylor_elements(torch.ones(2), torch.ones(2), None, "mix")


def whole_model_gradients(checkpoint: Checkpoint, samples: CalibrationSet, names: list[str]):
    """Gradient of every sample's own loss in some layers, through the whole model at once."""
    layers = {name: checkpoint.layer(name) for name in names}
    leaves = {}
    for name, layer in layers.items():
        layer.cached = leaves[f"{name}.weight"] = layer.form.dequantize().requires_grad_()
        if isinstance(layer, FormLinear) and layer.bias is not None:
            leaves[f"{name}.bias"] = layer.bias.requires_grad_()
    found = []
    for prompt, sample in zip(encode_samples(checkpoint.processor, samples), samples, strict=True):
        with torch.enable_grad():
            visual = encode_images(checkpoint, checkpoint.processor.pixels([sample.open_image()]))
            ids = torch.tensor([prompt.token_ids])
            logits = decode_logits(checkpoint, embed_prompts(checkpoint, ids, visual))[0]
            answer = slice(prompt.answer_start, prompt.answer_end)
            before = slice(prompt.answer_start - 1, prompt.answer_end - 1)
            loss = functional.cross_entropy(logits[before], ids[0, answer])
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        found.append(dict(zip(leaves, gradients, strict=True)))
    for layer in layers.values():
        layer.cached = None
    return {name: leaf.detach() for name, leaf in leaves.items()}, found


@pytest.mark.parametrize("order", ["first", "mix"])
def test_scores_of_a_model(tiny_path: Path, order: str):
    samples = CalibrationSet.from_reference(0, 3)
    checkpoint = Checkpoint.load(tiny_path)
    groups = [
        unit_groups(checkpoint.spec, "kv_groups")[0],
        unit_groups(checkpoint.spec, "ffn")[1],
        unit_groups(checkpoint.spec, "tower_ffn")[1],
    ]
    scorer = Taylor(order=order).begin(checkpoint, groups, samples, CONTEXT)
    names = [name for group in groups for name in group.linears]
    weights, gradients = whole_model_gradients(Checkpoint.load(tiny_path), samples, names)
    for group in groups:
        found = scorer.score(group, checkpoint, None)
        assert found.shape == (group.count,)
        for unit in (0, group.count - 1):
            only = torch.tensor([unit])
            mine = {
                f"{name}.weight": (group.rows_of(name, only), slice(None)) for name in group.rows
            }
            mine[f"{group.last}.weight"] = (slice(None), group.columns_of(only))
            for name in group.rows:
                if f"{name}.bias" in weights:
                    mine[f"{name}.bias"] = (group.rows_of(name, only),)
            expected = sum(
                textbook(float(w), values.tolist(), order)
                for name, places in mine.items()
                for w, values in zip(
                    weights[name][places].flatten(),
                    torch.stack([one[name][places].flatten() for one in gradients], dim=1),
                    strict=True,
                )
            )
            assert float(found[unit]) == pytest.approx(expected, rel=2e-3)
    assert (len(mine) == 3) == (group.part == "tower")  # fc1, its bias, fc2


def test_an_unknown_order_is_refused():
    with pytest.raises(
        ValueError, match="order 'third' is unknown; allowed are first, second, mix"
    ):
        Taylor(order="third")


def test_samples_without_answers_have_no_gradient(tiny_checkpoint: Checkpoint):
    samples = CalibrationSet.synthetic(n=2)
    silent = type(samples)(
        name="silent",
        samples=tuple(
            type(one)(image=one.image, question=one.question, answer="", where="data.jsonl:1")
            for one in samples
        ),
    )
    groups = unit_groups(tiny_checkpoint.spec, "ffn")
    with pytest.raises(CalibrationError, match="data.jsonl:1: has no answer"):
        Taylor().begin(tiny_checkpoint, groups, silent, CONTEXT)
