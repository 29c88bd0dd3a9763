"""The certificate: a sound artifact passes it, and each way of being broken fails it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pocketvlm.bundle import (
    Bundle,
    CacheLayout,
    Component,
    Generation,
    Manifest,
    PromptLayout,
)
from pocketvlm.calibration.source import Sample
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens import ReduceTokens
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError, InputError, ParityError
from pocketvlm.export.parity.certificate import BOUNDS, Bound, judge
from pocketvlm.export.parity.certify import ParityReport, certify
from pocketvlm.export.parity.metrics import cosine, relative_error, sqnr_db, total_variation
from pocketvlm.export.torch_runner import TorchRunner
from pocketvlm.pipeline.source_check import BOUNDS as SOURCE_BOUNDS
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.runner import Runner
from pocketvlm.weights.dense import DenseWeight


def picture(seed: int) -> Image.Image:
    """Coarse coloured squares: unlike noise, they survive being resized."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((96, 80), Image.Resampling.NEAREST)


SAMPLES = [
    Sample(image=picture(seed), question=question, answer="yes")
    for seed, question in enumerate(("what is it?", "is it red?", "how many?"))
]


@pytest.fixture
def reduced(tiny_checkpoint: Checkpoint) -> Checkpoint:
    no_calibration: Any = None
    stage = ReduceTokens(keep=0.5, positions="original")
    return stage.apply(tiny_checkpoint, no_calibration, RunContext())


def write_bundle(checkpoint: Checkpoint, folder: Path, **changes: Any) -> Bundle:
    """A bundle without graphs: what a runner in torch needs beside itself."""
    spec, reducer = checkpoint.spec, checkpoint.reducer
    folder.mkdir(exist_ok=True)
    checkpoint.processor.save(folder)
    manifest = Manifest(
        model="tiny",
        family=spec.family,
        source_sha256="",
        recipe_sha256="",
        visual_tokens=reducer.keep if reducer else spec.visual_tokens,
        visual_tokens_full=spec.visual_tokens,
        positions=reducer.positions if reducer else "original",
        prompt=PromptLayout(
            image_token=spec.image_token,
            image_token_id=spec.image_token_id,
            image_prefix=spec.image_prefix,
            image_suffix=spec.image_suffix,
        ),
        generation=Generation(eos_token_ids=(2,), max_positions=512),
        kv_cache=CacheLayout(layers=1, kv_heads=1, head_dim=1, dtype="float32"),
        components=(Component(target="torch", role="decoder", file="", inputs=(), outputs=()),),
    )
    return Bundle(path=folder, manifest=replace(manifest, **changes))


def certify_runner(
    checkpoint: Checkpoint,
    folder: Path,
    make: Callable[[Checkpoint], Runner],
    samples: Sequence[Sample] = SAMPLES,
    **changes: Any,
) -> ParityReport:
    bundle = write_bundle(checkpoint, folder, **changes)
    engines = {"torch": lambda _bundle, _threads, _rows: make(checkpoint)}
    return certify(checkpoint, bundle, samples, tokens=6, engines=engines)


def failed(report: ParityReport) -> set[str]:
    return {check.metric for check in report.targets[0].checks if not check.passed}


@pytest.mark.parametrize("positions", ["original", "consecutive", None])
def test_the_checkpoint_itself_passes(
    positions: Any, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint
    if positions:
        no_calibration: Any = None
        stage = ReduceTokens(keep=0.4, positions=positions)
        checkpoint = stage.apply(checkpoint, no_calibration, RunContext())
    report = certify_runner(checkpoint, tmp_path, TorchRunner)
    assert failed(report) == set()
    assert report.passed
    report.raise_if_failed()
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    target = document["targets"]["torch"]
    assert target["passed"] is True
    assert {check["metric"] for check in target["checks"]} == set(BOUNDS)
    assert target["details"]["greedy_tokens_equal"] == target["details"]["greedy_tokens_compared"]
    assert target["details"]["image_swap_mean_total_variation"] > 0


class IgnoresImages(TorchRunner):
    def encode_image(self, pixels: Any, variant: Any = None) -> Any:
        return super().encode_image(np.zeros_like(pixels), variant)


class CountsPositionsAnew(TorchRunner):
    def decode(
        self, embeds: Any, position_ids: Any, is_visual: Any = None, mutual: Any = None
    ) -> Any:
        consecutive = np.arange(self.length, self.length + embeds.shape[1])[None]
        return super().decode(embeds, consecutive, is_visual, mutual)


class KeepsItsCache(TorchRunner):
    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint, capacity=10_000)

    def reset(self) -> None:
        pass


class ForgetsItsCache(TorchRunner):
    def decode(
        self, embeds: Any, position_ids: Any, is_visual: Any = None, mutual: Any = None
    ) -> Any:
        self.truncate(0)
        return super().decode(embeds, position_ids, is_visual, mutual)


class KeepsOtherTokens(TorchRunner):
    def encode_image(self, pixels: Any, variant: Any = None) -> Any:
        _, indices = super().encode_image(pixels, variant)
        count = self.checkpoint.spec.visual_tokens
        others = np.setdiff1d(np.arange(count), indices[0])[: indices.shape[1]]
        whole = replace(self.checkpoint, reducer=None)
        return TorchRunner(whole).encode_image(pixels)[0][:, others], others[None]


class ConfusesChannels(TorchRunner):
    def encode_image(self, pixels: Any, variant: Any = None) -> Any:
        return super().encode_image(np.ascontiguousarray(pixels[:, ::-1]), variant)


class ReturnsNothing(TorchRunner):
    def decode(
        self, embeds: Any, position_ids: Any, is_visual: Any = None, mutual: Any = None
    ) -> Any:
        return super().decode(embeds, position_ids, is_visual, mutual) * np.float32("nan")


class EmbedsTheNextToken(TorchRunner):
    def embed(self, token_ids: Any) -> Any:
        return super().embed([(token + 1) % 300 for token in token_ids])


@pytest.mark.parametrize(
    ("broken", "caught_by"),
    [
        (IgnoresImages, {"image_swap.change_ratio", "vision.relative_error", "chain.sqnr_db"}),
        (CountsPositionsAnew, {"prefill.sqnr_db", "chain.sqnr_db"}),
        (KeepsItsCache, {"prefill.sqnr_db", "two_turns.reference_sqnr_db"}),
        (ForgetsItsCache, {"two_turns.sqnr_db"}),
        (KeepsOtherTokens, {"vision.index_overlap", "chain.sqnr_db"}),
        (ConfusesChannels, {"vision.relative_error", "image_swap.change_cosine"}),
        (ReturnsNothing, {"prefill.sqnr_db", "image_swap.change_ratio", "two_turns.sqnr_db"}),
        (EmbedsTheNextToken, {"embedding.relative_error", "chain.sqnr_db"}),
    ],
)
def test_a_broken_artifact_is_caught(
    broken: type[TorchRunner], caught_by: set[str], reduced: Checkpoint, tmp_path: Path
) -> None:
    report = certify_runner(reduced, tmp_path, broken)
    assert caught_by <= failed(report)
    json.dumps(report.to_json(), allow_nan=False)
    with pytest.raises(ParityError, match=r"^parity of torch: \S+ is .* is required"):
        report.raise_if_failed()


def test_a_corrupted_weight_is_caught(reduced: Checkpoint, tiny_path: Path, tmp_path: Path) -> None:
    def corrupted(checkpoint: Checkpoint) -> Runner:
        broken = Checkpoint.load(tiny_path)
        name = f"{broken.spec.decoder.stack}.1.mlp.down_proj"
        values = broken.form(name).dequantize()
        values[:8] *= -1
        broken.set_form(name, DenseWeight(values=values))
        return TorchRunner(replace(broken, reducer=checkpoint.reducer))

    caught = failed(certify_runner(reduced, tmp_path, corrupted))
    assert {"prefill.sqnr_db", "chain.sqnr_db"} <= caught
    assert "vision.relative_error" not in caught


def test_a_manifest_with_the_wrong_positions_is_caught(reduced: Checkpoint, tmp_path: Path) -> None:
    report = certify_runner(reduced, tmp_path, TorchRunner, positions="consecutive")
    assert "chain.sqnr_db" in failed(report)
    assert "prefill.sqnr_db" not in failed(report)  # the decoder itself is sound


def test_another_prompt_is_caught(reduced: Checkpoint, tmp_path: Path) -> None:
    bundle = write_bundle(reduced, tmp_path)
    prompt = replace(bundle.manifest.prompt, image_suffix="!")
    report = certify_runner(reduced, tmp_path, TorchRunner, prompt=prompt)
    assert failed(report) == {"input.prompts_equal"}


def test_other_pixels_are_caught(reduced: Checkpoint, tmp_path: Path) -> None:
    bundle = write_bundle(reduced, tmp_path)
    file = tmp_path / "preprocessor_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["image_mean"] = [0.1, 0.1, 0.1]
    file.write_text(json.dumps(config), encoding="utf-8")
    engines = {"torch": lambda _bundle, _threads, _rows: TorchRunner(reduced)}
    report = certify(reduced, bundle, SAMPLES, tokens=2, engines=engines)
    assert failed(report) == {"input.pixels_max_abs"}


class SwapsItsFavourites(TorchRunner):
    """Exchanges the two best logits after the prompt: a wrong token with hardly any error."""

    def decode(
        self, embeds: Any, position_ids: Any, is_visual: Any = None, mutual: Any = None
    ) -> Any:
        logits = super().decode(embeds, position_ids, is_visual, mutual).copy()
        if embeds.shape[1] == 1:
            first, second = np.argsort(logits)[::-1][:2]
            logits[[first, second]] = logits[[second, first]]
        return logits


class Trembles(TorchRunner):
    """Adds the noise of a coarse kernel."""

    def decode(
        self, embeds: Any, position_ids: Any, is_visual: Any = None, mutual: Any = None
    ) -> Any:
        logits = super().decode(embeds, position_ids, is_visual, mutual)
        noise = np.random.default_rng(self.length).normal(size=logits.shape)
        return logits + (0.05 * logits.std() * noise).astype(np.float32)


def test_a_wrong_token_is_told_from_a_near_tie(reduced: Checkpoint, tmp_path: Path) -> None:
    wrong = certify_runner(reduced, tmp_path, SwapsItsFavourites)
    assert failed(wrong) == {"greedy.mismatch_share"}
    details = wrong.targets[0].details
    assert details["greedy_near_ties"] == 0
    assert details["greedy_mismatches"][0]["margin"] > details["near_tie_margin_logit"]

    samples = [
        Sample(image=picture(seed), question=f"what is {seed}?", answer="a") for seed in range(12)
    ]
    noisy = certify_runner(reduced, tmp_path, Trembles, samples)
    details = noisy.targets[0].details
    assert "greedy.mismatch_share" not in failed(noisy)
    assert details["greedy_near_ties"] > 0
    assert details["greedy_tokens_equal"] < details["greedy_tokens_compared"]


def test_a_target_without_an_engine_is_not_certified(reduced: Checkpoint, tmp_path: Path) -> None:
    report = certify(reduced, write_bundle(reduced, tmp_path), SAMPLES, engines={})
    assert report.unverified == {"torch": "no engine on this host runs it"}
    assert not report.passed
    with pytest.raises(ParityError, match="no target could be run"):
        report.raise_if_failed()


def test_a_certificate_needs_pictures(reduced: Checkpoint, tmp_path: Path) -> None:
    text_only = [Sample(image=None, question="why?", answer="so")]
    with pytest.raises(CalibrationError, match="a question about a picture"):
        certify(reduced, write_bundle(reduced, tmp_path), text_only)


def test_judging_wants_every_metric() -> None:
    with pytest.raises(ValueError, match="do not match"):
        judge({"prefill.sqnr_db": 100.0}, "float32")


def test_nan_is_never_within_a_bound() -> None:
    assert not Bound(at_most=1.0).holds(float("nan"))
    assert not Bound(at_least=1.0).holds(float("nan"))


def test_integer_bounds_are_no_tighter_than_those_of_float32() -> None:
    for columns in BOUNDS.values():
        strict, loose = columns["float32"], columns["integer"]
        assert (loose.at_least or 0) <= (strict.at_least or 0)
        assert (loose.at_most or 0) >= (strict.at_most or 0)


def test_closeness_against_its_definitions() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50)).astype(np.float32)
    difference = (a.astype(np.float64) - b) ** 2
    assert relative_error(a, b) == pytest.approx(
        np.sqrt(difference.sum() / (b.astype(np.float64) ** 2).sum())
    )
    assert sqnr_db(a, b) == pytest.approx(
        10 * np.log10((b.astype(np.float64) ** 2).sum() / difference.sum())
    )
    assert sqnr_db(b, b) == 200
    assert sqnr_db(a * np.float32("nan"), b) == -200
    assert cosine(a, 3 * a) == pytest.approx(1)
    assert cosine(a, -a) == pytest.approx(-1)
    assert cosine(a, 0 * a) == 0
    p, q = (
        torch.softmax(torch.from_numpy(a).double(), 0),
        torch.softmax(torch.tensor(b).double(), 0),
    )
    assert total_variation(a, b) == pytest.approx(float((p - q).clamp(min=0).sum()))


def test_a_checkpoint_holds_a_conversation(reduced: Checkpoint, tmp_path: Path) -> None:
    bundle = write_bundle(reduced, tmp_path)
    conversation = Conversation(bundle, runner=TorchRunner(reduced))
    first = conversation.ask("what is it?", picture(0), max_new_tokens=4)
    second = conversation.ask("why?", max_new_tokens=4)
    assert second.timings.reused_tokens > 0
    again = Conversation(bundle, runner=TorchRunner(reduced))
    assert again.ask("what is it?", picture(0), max_new_tokens=4).token_ids == first.token_ids


def test_capacity_is_respected(reduced: Checkpoint) -> None:
    runner = TorchRunner(reduced, capacity=4)
    with pytest.raises(InputError, match="rows of KV cache"):
        runner.decode(np.zeros((1, 5, 64), np.float32), np.arange(5)[None])


def test_the_documentation_has_every_bound() -> None:
    page = (Path(__file__).parents[3] / "docs" / "parity.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert rows.keys() == BOUNDS.keys() | SOURCE_BOUNDS.keys()
    for metric, bound in SOURCE_BOUNDS.items():
        values = (bound.at_least, bound.at_most)
        assert all(f"{value:g}" in rows[metric] for value in values if value is not None), metric
    for metric, columns in BOUNDS.items():
        cells = [cell.strip() for cell in rows[metric].split("|")[3:6]]
        bounds = (columns["float32"], columns["float16"], columns["integer"])
        for bound, cell in zip(bounds, cells, strict=True):
            values = (bound.at_least, bound.at_most)
            assert all(f"{value:g}" in cell for value in values if value is not None), metric
