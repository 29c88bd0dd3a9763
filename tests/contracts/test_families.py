"""What every family promises: stock's answers in torch, and torch's answers in the artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from pocketvlm.bundle import Bundle
from pocketvlm.calibration.source import CalibrationSet, Sample
from pocketvlm.checkpoint import Checkpoint, read_model_folder
from pocketvlm.checkpoint.config import read_spec
from pocketvlm.context import RunContext
from pocketvlm.errors import InputError, UnsupportedError
from pocketvlm.export.parity.certify import ParityReport, certify
from pocketvlm.export.parity.metrics import relative_error
from pocketvlm.models.families.table import FAMILIES
from pocketvlm.models.images.tilings.anyres import Anyres
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.pipeline.source_check import BOUNDS, verify_folder
from pocketvlm.pipeline.stock import StockAnswer, StockModel
from pocketvlm.processor import Processor, user_message
from pocketvlm.prompt.messages import Turn, user_turn
from pocketvlm.reference.random_models import TINY_MODELS, tiny_config, write_tiny_model
from pocketvlm.reference_graph.forward import (
    decode_logits,
    embed_prompts,
    encode_images,
    greedy_generate,
)
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.engines import open_engine
from pocketvlm.runtime.executorch.native_runner import prompt_parts
from pocketvlm.runtime.preprocess import ImagePreprocessor
from pocketvlm.runtime.text import TextCodec
from pocketvlm.stages import PlanState
from pocketvlm.weights.layout import AffineLayout
from tests.contracts.shallow import write_shallow_model
from tests.contracts.targets import CERTIFIED, INT4_STAGES, TARGETS
from tests.processor.test_tiles import SIZES, picture

FEWEST_WORDS = 4
"""Different tokens among the 32 of an answer: one that repeats itself proves little."""

FEWEST_SIZES = 50
"""Of pictures whose pixels are compared."""

ROUNDING = 5e-6
"""Largest relative error of logits that are sums of the same numbers in another order."""


@pytest.fixture(scope="module", params=TINY_MODELS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family") / request.param
    write_tiny_model(request.param, folder)
    return folder


def test_every_reader_has_a_tiny_model():
    read = {read_spec(tiny_config(name)).family for name in TINY_MODELS}
    assert read == {FAMILIES[name].__name__.removeprefix("read_") for name in FAMILIES}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_family_runs_on_onnx(name):
    assert TARGETS["onnx"].refuse(PlanState.of(read_spec(tiny_config(name)))) == ()


def test_the_source_check_passes_to_the_last_bit(path):
    """Folded weights are rounded once more than stock's: there it is the last bits."""
    report = verify_folder(path)
    assert report.verdict == "passed", report.lines()
    assert {check.metric for check in report.checks} == set(BOUNDS)
    spec = read_model_folder(path).spec
    is_rounded = spec.folds or (isinstance(spec.tiling, Anyres) and spec.tiling.most_area)
    error = ROUNDING if is_rounded else 0.0
    for check in report.checks:
        if check.metric.endswith("_equal"):
            assert check.value == 1.0, check
        else:
            assert check.value <= error, check


def test_pixels_and_prompts_are_those_of_the_stock_processor_for_every_size(path):
    """From one pixel to 1:200, and at the borders between two ways of cutting a picture."""
    spec = read_model_folder(path).spec
    processor, stock = Processor.load(path, spec), stock_model(path)
    own = ImagePreprocessor.from_settings(processor.image_processor.settings)
    asked = user_turn("what is it?", 1)
    assert len(set(SIZES)) >= FEWEST_SIZES
    for size in SIZES:
        image = picture(size)
        token_ids, pixels = stock.prompt([asked], [image])
        np.testing.assert_array_equal(own.pixels(image), pixels, err_msg=str(size))
        assert processor.encode([asked.to_message()], [own.grid(image)]) == token_ids, size


def test_a_system_prompt_and_later_pictures_are_those_of_the_stock_processor(path):
    """The prompt's tokens, with two pictures and one more in a second turn."""
    spec = read_model_folder(path).spec
    processor, stock = Processor.load(path, spec), stock_model(path)
    images = pictures((WIDE, SQUARE, (20, 70)))
    turns = (
        Turn(role="system", parts=("be brief",)),
        user_turn("what are these?", 2),
        Turn(role="assistant", parts=("noise",)),
        user_turn("and this?", 1),
    )
    messages = [turn.to_message() for turn in turns]
    if spec.family == "paligemma":  # whose prompt has no turns
        with pytest.raises(InputError, match="takes no system prompt"):
            processor.encode(messages, processor.grids(images))
        return
    token_ids, _ = stock.prompt(turns, images)
    assert processor.encode(messages, processor.grids(images)) == token_ids


@torch.inference_mode()
def test_logits_and_answers_are_those_of_the_stock_model(path):
    checkpoint = Checkpoint.load(path)
    sizes = ((60, 40), (31, 90))
    processor, images = checkpoint.processor, pictures(sizes)
    expected = stock_answer(path, (user_turn("what is it?", 2),), sizes)
    grids = processor.grids(images)
    pixels = processor.pixels(images, grids)
    messages = [user_message("what is it?", images=2)]
    ids = processor.encode(messages, grids)
    assert ids == expected.token_ids
    visual = encode_images(checkpoint, pixels)
    inputs = embed_prompts(checkpoint, torch.tensor([ids]), visual, grids)
    logits = decode_logits(checkpoint, inputs)[0].numpy()
    assert relative_error(logits, expected.logits) < ROUNDING
    answers = greedy_generate(checkpoint, inputs, max_new_tokens=32)
    assert answers == [expected.generated]
    assert len(set(expected.generated)) >= FEWEST_WORDS


def test_every_linear_and_norm_of_the_spec_is_one_of_the_model(path):
    checkpoint = Checkpoint.load(path)
    modules = dict(checkpoint.model.named_modules())
    for linear in checkpoint.spec.linears():
        module = modules[linear.name]
        assert module.form.shape == (linear.out_features, linear.in_features)
        assert (getattr(module, "bias", None) is not None) == linear.has_bias, linear.name
    for norm in checkpoint.spec.norms():
        module = modules[norm.name]
        assert module.weight.shape == (norm.width,)
        assert (getattr(module, "bias", None) is not None) == norm.has_bias


def pictures(sizes):
    values = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    return [Image.fromarray(values).resize(size) for size in sizes]


def squares(seed: int, size: tuple[int, int]) -> Image.Image:
    """Coarse coloured squares: unlike noise, two of them differ much after they are resized."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


@cache
def stock_model(path: Path) -> StockModel:
    return StockModel.load(read_model_folder(path))


@cache
@torch.inference_mode()
def stock_answer(
    path: Path, turns: tuple[Turn, ...], sizes: tuple[tuple[int, int], ...]
) -> StockAnswer:
    """The prompt's logits and 32 greedy tokens of stock's model, by its own processor."""
    return stock_model(path).answer(turns, pictures(sizes), max_new_tokens=32)


TILES = {
    "smolvlm-tiles": [7, 10],
    "internvl3": [11, 5],
    "internvl3.5": [11, 5],
    "lfm2-vl-tiles": [4, 1],
    "llava-next": [4, 5],
    "granite-vision": [4, 5],
}
"""Of the two pictures, by the models that cut several."""

ARTIFACTS = {
    "onnx": TARGETS["onnx"],
    "executorch": TARGETS["executorch"],
    "coreml": replace(TARGETS["coreml"], precision="float32"),
    "coreml-float16": TARGETS["coreml"],
}
"""Targets in all the precisions that they have for floats."""

ERRORS = {"onnx": 1e-4, "executorch": 1e-4, "coreml": 1e-5, "coreml-float16": 1e-2}
"""Of a prompt's logits, by their largest; half precision has three digits."""

TIES = {**dict.fromkeys(ARTIFACTS, 0.0), "coreml-float16": ERRORS["coreml-float16"]}
"""Logits this close are a tie, by their largest: rounding in half precision decides, which numpy
does otherwise on other processors."""

WIDE, SQUARE = (150, 60), (50, 50)


COVERED = {
    "llava": "tests/export/executorch",
    "smolvlm": "tests/export/executorch",
    "smolvlm-tiles": "smolvlm",
    "idefics3": "smolvlm",
    "llava-interleave": "lfm2-vl-tiles",
    "llava-next": "tests/export/executorch",
    "llava-onevision": "lfm2-vl-tiles",
    "granite-vision": "lfm2-vl-tiles and glm-ocr",
    "internvl3": "tests/export, where qwen2.5-vl has two vision graphs",
    "internvl3.5": "gemma3 and glm-ocr",
    "lfm2-vl": "lfm2-vl-tiles",
    "paddleocr-vl": "lfm2-vl-tiles and glm-ocr",
    "qwen2-vl": "lfm2-vl-tiles and glm-ocr",
    "qwen2.5-vl": "tests/export, where it has two vision graphs",
    "paligemma": "gemma3",
}
"""Models whose operators other tests run on ExecuTorch, where lowering takes half a minute."""


@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_an_artifact_answers_as_the_stock_model_does(
    path, tmp_path, monkeypatch, artifact, pytestconfig
):
    """Two turns, two pictures of other sizes, one of them split where the family splits."""
    skip_covered(path, artifact, pytestconfig)
    checkpoint = Checkpoint.load(path)
    context, target = RunContext(threads=1), ARTIFACTS[artifact]
    if target.refuse(PlanState.of(checkpoint.spec)):  # docs/families.md has the reason
        with pytest.raises(UnsupportedError):
            write_graphs(checkpoint, (target,), tmp_path / "bundle", "", context)
        return
    write_graphs(checkpoint, (target,), tmp_path / "bundle", "", context)
    bundle = Bundle.open(tmp_path / "bundle")
    wide, square = pictures((WIDE, SQUARE))
    # No token ends an answer, so that all of them are compared.
    endless = replace(bundle.manifest.generation, eos_token_ids=())
    bundle = replace(bundle, manifest=replace(bundle.manifest, generation=endless))
    runner = open_engine(bundle, target.method, threads=1)
    logits: list[npt.NDArray[np.float32]] = []
    decode = runner.decode
    monkeypatch.setattr(
        runner, "decode", lambda *rows: logits.append(decode(*rows).copy()) or logits[-1]
    )
    talk = Conversation(bundle, runner=runner)
    first = talk.ask("what is it?", wide, max_new_tokens=32)
    asked = user_turn("what is it?", 1)
    expected = stock_answer(path, (asked,), (WIDE,))
    require_greedy(first.token_ids, expected.generated, logits, TIES[artifact])
    assert len(set(first.token_ids)) >= FEWEST_WORDS
    # The last row of the prompt, whose call is the first to return logits of the answer.
    prefill, stock = logits[len(logits) - len(first.token_ids)], expected.logits[-1]
    assert np.abs(prefill - stock).max() <= ERRORS[artifact] * np.abs(stock).max()
    codec = TextCodec.from_bundle(bundle)
    if checkpoint.spec.line_break is None:
        parts = prompt_parts(bundle, codec, asked, [wide])
        shown = [part for part in parts if isinstance(part, np.ndarray)]
        np.testing.assert_array_equal(np.concatenate(shown), checkpoint.processor.pixels([wide]))
    else:
        with pytest.raises(InputError, match="MultimodalRunner shows tile after tile"):
            prompt_parts(bundle, codec, asked, [wide])
    second = talk.ask("and this?", square, max_new_tokens=8)
    assert checkpoint.processor.tiles([wide, square]) == TILES.get(path.name, [1, 1])
    turns = (asked, Turn(role="assistant", parts=(first.text,)), user_turn("and this?", 1))
    wanted = stock_answer(path, turns, (WIDE, SQUARE)).generated[:8]
    require_greedy(second.token_ids, wanted, logits, TIES[artifact])
    # Where all rows of a prompt see each other, a longer prompt has none of the old rows.
    is_whole = checkpoint.spec.decoder.mutual_rows == "prompt"
    assert (second.timings.reused_tokens == 0) == is_whole


def require_greedy(
    found: Sequence[int],
    expected: Sequence[int],
    logits: Sequence[npt.NDArray[np.float32]],
    tie: float,
) -> None:
    """Requires the tokens that are expected, up to the first of two whose logits are a tie.

    Args:
        found: Tokens of the artifact.
        expected: Tokens of stock.
        logits: Of the artifact, of all calls; the last ones gave these tokens.
        tie: See `TIES`; 0 allows none.
    """
    assert len(found) == len(expected)
    rows = logits[len(logits) - len(found) :]
    for ours, theirs, row in zip(found, expected, rows, strict=True):
        if ours != theirs:  # what follows answers another text
            assert row[ours] - row[theirs] < tie * np.abs(row).max(), (found, expected)
            return


def skip_covered(path: Path, artifact: str, config: pytest.Config) -> None:
    """Skips a program whose operators another test runs, unless all are asked for."""
    covers = COVERED.get(path.name) if artifact == "executorch" else None
    if covers and not config.getoption("exhaustive"):
        pytest.skip(f"covered by {covers}: the same operators; --exhaustive runs this as well")


def test_an_int4_bundle_passes_its_certificate(path, tmp_path):
    """The certificate that `compress` makes, of integers in the graphs and activations in floats.

    ONNX Runtime's default rounds activations too, which is 24 dB away on one random model of 64
    channels, where 25 are required: no fault of a graph.
    """
    names = tuple(name for name in CERTIFIED if name != "executorch")
    report = certify_int4(path, names, tmp_path)
    assert report.failures() == []
    assert {parity.target for parity in report.targets} == set(names)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_an_int4_program_passes_its_certificate(name, tmp_path, pytestconfig):
    """One block of each kind: XNNPACK rounds activations, which adds up in random ones."""
    if name not in INT4_PROGRAMS and not pytestconfig.getoption("exhaustive"):
        pytest.skip("lowering takes a minute; --exhaustive runs this as well")
    write_shallow_model(name, tmp_path / "model")
    report = certify_int4(tmp_path / "model", ("executorch",), tmp_path)
    assert report.failures() == []
    assert [parity.target for parity in report.targets] == ["executorch"]


INT4_PROGRAMS = ("lfm2-vl",)
"""Models whose int4 program every run lowers: of its products the rows differ most in size."""


def certify_int4(path: Path, targets: Sequence[str], folder: Path) -> ParityReport:
    """The certificate of a model after the stages of `int4-small`."""
    checkpoint, context = Checkpoint.load(path), RunContext(threads=1)
    samples = CalibrationSet(
        name="test",
        samples=[
            Sample(image=squares(seed, size), question=question, answer="yes")
            for seed, (size, question) in enumerate([(WIDE, "what is it?"), (SQUARE, "is it red?")])
        ],
    )
    for stage in INT4_STAGES:
        checkpoint = stage.apply(checkpoint, samples, context)
    assert all(isinstance(form.layout, AffineLayout) for form in checkpoint.forms().values())
    write_graphs(checkpoint, [TARGETS[name] for name in targets], folder / "bundle", "", context)
    return certify(checkpoint, Bundle.open(folder / "bundle"), samples, tokens=4, ctx=context)


def test_a_saved_checkpoint_is_the_same_model(path, tmp_path):
    checkpoint = Checkpoint.load(path)
    checkpoint.save(tmp_path / "saved")
    again = Checkpoint.load(tmp_path / "saved")
    assert asdict(again.spec) == asdict(checkpoint.spec)
    before, after = checkpoint.vectors(), again.vectors()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
