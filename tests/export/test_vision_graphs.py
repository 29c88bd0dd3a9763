"""Several vision graphs in one bundle: other numbers of tokens, other sizes, the same weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pocketvlm.bundle import Bundle
from pocketvlm.calibration import CalibrationSet, Sample
from pocketvlm.checkpoint import Checkpoint, read_model_folder
from pocketvlm.context import RunContext
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.export.executorch.target import ToExecutorch
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.export.parity.certificate import ParityReport
from pocketvlm.export.torch_runner import TorchRunner
from pocketvlm.pipeline.assemble import build_bundle, write_graphs
from pocketvlm.pipeline.plan import plan_stages
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.pipeline.stock import StockModel
from pocketvlm.processor.patches import fit_picture
from pocketvlm.recipes.load import recipe_from_document
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.reference_graph.forward import encode_images
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.engines import ENGINES
from pocketvlm.runtime.onnx.runner import OnnxRunner
from pocketvlm.runtime.vision import VisionChoice
from pocketvlm.stages import Target

CONTEXT = RunContext(threads=1)
ONNX = ToOnnx(accuracy_level=0, tower_accuracy_level=0)
TARGETS: dict[str, Target] = {
    "onnx": ONNX,
    "executorch": ToExecutorch(context=512),
    "coreml": ToCoreml(precision="float32", context=512),
}
BUCKETS = [{"method": "reduce_tokens", "reducer": {"kind": "distinct_features"}, "keep": [8, 0.25]}]
SIZES = [
    {
        "method": "set_resolution",
        "height": 64,
        "width": 64,
        "also": [{"height": 32, "width": 96}, {"height": 96, "width": 32}],
    }
]
RECIPES = {
    "buckets": ("llava", BUCKETS, ["k8_32x32", "k4_32x32"]),
    "sizes": ("qwen2.5-vl", SIZES, ["k16_64x64", "k12_96x32", "k12_32x96"]),
    "dropped": (
        "llava",
        [
            {**BUCKETS[0], "reducer": {"kind": "uniform_stride"}},
            {
                "method": "drop_tokens",
                "schedule": {"kind": "fast_v", "first_layers": 1, "keep": 0.5},
            },
        ],
        ["k8_32x32", "k4_32x32"],
    ),
    "both": (
        "qwen2-vl",
        [
            {**SIZES[0], "also": [{"height": 32, "width": 96}]},
            {**BUCKETS[0], "reducer": {"kind": "uniform_stride"}},
        ],
        ["k8_64x64", "k4_64x64", "k8_96x32", "k3_96x32"],
    ),
    "pair": (  # for a target that takes seconds per graph; test_families counts on its windows
        "qwen2.5-vl",
        [
            {**SIZES[0], "also": [{"height": 32, "width": 96}]},
            {**BUCKETS[0], "reducer": {"kind": "uniform_stride"}, "keep": 0.5},
        ],
        ["k8_64x64", "k6_96x32"],
    ),
}


def picture(seed: int, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.NEAREST)


SAMPLES = tuple(
    Sample(image=picture(seed, 96, 80), question=question, answer="yes", kind="any")
    for seed, question in enumerate(("what is it?", "is it red?"))
)


def compressed(folder: Path, kind: str) -> tuple[Checkpoint, Checkpoint]:
    """The checkpoint before and after a recipe."""
    model, stages, _ = RECIPES[kind]
    write_tiny_model(model, folder)
    document = {"schema": 1, "name": kind, "stages": stages}
    source = done = load_checkpoint(folder)
    samples = CalibrationSet(name="test", samples=SAMPLES)
    for stage in recipe_from_document(document, where=kind).stages:
        done = stage.apply(done, samples, CONTEXT)
    return source, done


@dataclass(frozen=True)
class Built:
    kind: str
    source: Checkpoint
    checkpoint: Checkpoint
    target: Target
    bundle: Bundle
    parity: ParityReport


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints before and after each recipe, made when they are asked for."""
    found: dict[str, tuple[Checkpoint, Checkpoint]] = {}

    def make(kind: str) -> tuple[Checkpoint, Checkpoint]:
        if kind not in found:
            found[kind] = compressed(tmp_path_factory.mktemp("vision") / "model", kind)
        return found[kind]

    return make


CASES = [("onnx", "buckets"), ("onnx", "both"), ("executorch", "pair"), ("coreml", "both")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def built(request, made, tmp_path_factory) -> Built:
    name, kind = request.param
    source, checkpoint = made(kind)
    target = TARGETS[name]
    place = tmp_path_factory.mktemp("bundle") / "bundle"
    recipe = recipe_from_document({"schema": 1, "name": kind, "stages": []}, where=kind)
    found = build_bundle(checkpoint, recipe, (target,), place, SAMPLES, CONTEXT)
    return Built(kind, source, checkpoint, target, found.bundle, found.parity)


def open_talk(built: Built) -> Conversation:
    endless = replace(built.bundle.manifest.generation, eos_token_ids=())
    bundle = replace(built.bundle, manifest=replace(built.bundle.manifest, generation=endless))
    return Conversation(bundle, runner=ENGINES[built.target.method](bundle, 1, 0))


def test_every_graph_is_certified_and_named(built):
    names = RECIPES[built.kind][2]
    manifest = Bundle.open(built.bundle.path).manifest
    assert [variant.name for variant in manifest.variants] == names
    assert built.parity.failures() == []
    target = built.target.method
    assert list(built.parity.to_json()["targets"]) == [
        target,
        *(f"{target} {name}" for name in names[1:]),
    ]


def test_a_plan_knows_every_graph(built):
    stages = recipe_from_document(
        {"schema": 1, "name": built.kind, "stages": RECIPES[built.kind][1]}, where="planned"
    ).stages
    planned = plan_stages(stages, built.source.spec, (built.target,))
    assert planned.visual_tokens == built.bundle.manifest.visual_tokens
    found = [vision.vision_variant for vision in planned.each_vision()]
    assert tuple(found) == built.bundle.manifest.variants


def test_graphs_share_their_weights(built):
    """The tower's numbers stand once in all files of a target, whichever way round."""
    name = built.checkpoint.spec.tower.blocks[0].ffn.down
    values = built.checkpoint.form(name).dequantize()
    narrow = values.to(torch.bfloat16)
    stored = [values.numpy()]
    if torch.equal(narrow.to(torch.float32), values):
        stored.append(narrow.view(torch.int16).numpy())
    files = (built.bundle.path / built.target.method).rglob("*")
    content = [file.read_bytes() for file in files if file.is_file()]
    ways = {way.tobytes() for array in stored for way in (array, array.T.copy())}
    assert sum(data.count(way) for data in content for way in ways) == 1


def test_another_graph_adds_the_bytes_that_a_plan_counts(made, tmp_path):
    _, checkpoint = made("both")
    specs = [seen.spec for seen in checkpoint.each_vision()]
    layouts = {linear: form.layout for linear, form in checkpoint.forms().items()}
    planned, written = [], []
    for others, held in ((specs[1:], checkpoint), ((), checkpoint.each_vision()[0])):
        planned.append(sum(ONNX.predict(specs[0], layouts, others=others).part_bytes.values()))
        folder = tmp_path / str(len(others))
        write_graphs(held, (ONNX,), folder, "", CONTEXT)
        written.append(sum(file.stat().st_size for file in (folder / "onnx").iterdir()))
    # A block of a tower is counted alike whatever its operators are; a second tower would be more.
    assert 0.6 < (written[0] - written[1]) / (planned[0] - planned[1]) < 1.5


def test_a_graph_returns_what_torch_does(built):
    runner = ENGINES[built.target.method](built.bundle, 1, 0)
    for seen in (*built.checkpoint.each_vision(), *built.checkpoint.each_vision()[::-1]):
        pixels = seen.processor.pixels([picture(5, 70, 50)])
        with torch.inference_mode():
            expected = encode_images(seen, pixels)
        embeds, indices = runner.encode_image(pixels.numpy(), seen.vision_variant.name)
        np.testing.assert_array_equal(indices, expected.indices)
        np.testing.assert_allclose(embeds, expected.embeds, rtol=0, atol=2e-4)


def test_a_question_chooses_its_graph_and_earlier_pictures_keep_theirs(built):
    talks = [
        open_talk(built),
        Conversation(
            replace(
                built.bundle,
                manifest=replace(
                    built.bundle.manifest,
                    generation=replace(built.bundle.manifest.generation, eos_token_ids=()),
                ),
            ),
            runner=TorchRunner(built.checkpoint),
        ),
    ]
    variants = built.bundle.manifest.variants
    for variant in (variants[-1], variants[0], variants[-1]):
        choice = VisionChoice(
            visual_tokens=variant.visual_tokens, resolution=(variant.width, variant.height)
        )
        answers = [
            talk.ask("and this?", picture(7, 60, 60), vision=choice, max_new_tokens=8)
            for talk in talks
        ]
        assert answers[0].token_ids == answers[1].token_ids
        assert answers[0].timings.visual_tokens == variant.visual_tokens
        # Words of an answer may be read back as other tokens; rows of pictures are kept.
        assert answers[0].rewound_rows < 8
    answer = talks[0].ask("so?", max_new_tokens=2)
    assert answer.timings.visual_tokens == 0


@pytest.mark.parametrize("kind", ["sizes", "both"])
def test_a_checkpoint_keeps_its_graphs_when_saved(made, tmp_path, kind):
    _, checkpoint = made(kind)
    checkpoint.save(tmp_path / "saved")
    again = load_checkpoint(tmp_path / "saved")
    for one, other in zip(checkpoint.each_vision(), again.each_vision(), strict=True):
        assert one.vision_variant == other.vision_variant
        pixels = one.processor.pixels([picture(3, 40, 90)])
        assert torch.equal(pixels, other.processor.pixels([picture(3, 40, 90)]))
        with torch.inference_mode():
            ours, theirs = encode_images(one, pixels), encode_images(other, pixels)
        assert torch.equal(ours.embeds, theirs.embeds)
        assert torch.equal(ours.indices, theirs.indices)


def test_rows_leave_the_decoder_by_the_same_shares_whichever_graph_made_them(tmp_path):
    _, done = compressed(tmp_path / "model", "dropped")
    recipe = recipe_from_document({"schema": 1, "name": "dropped", "stages": []}, where="dropped")
    found = build_bundle(done, recipe, (ONNX,), tmp_path / "bundle", SAMPLES, CONTEXT)
    assert found.parity.failures() == []
    assert [target.variant for target in found.parity.targets] == [None, "k4_32x32"]


def test_pictures_of_two_sizes_in_one_prompt_are_answered_as_by_stock(tmp_path):
    """Stock gives each picture its own size; the bundle chooses the one of the closest ratio."""
    _, done = compressed(tmp_path / "model", "sizes")
    write_graphs(done, (ONNX,), tmp_path / "bundle", "", CONTEXT)
    bundle = Bundle.open(tmp_path / "bundle")
    endless = replace(bundle.manifest.generation, eos_token_ids=())
    bundle = replace(bundle, manifest=replace(bundle.manifest, generation=endless))
    talk = Conversation(bundle, runner=OnnxRunner(bundle, threads=1))
    pictures = [picture(1, 200, 60), picture(2, 70, 64), picture(3, 50, 180)]
    answer = talk.ask("what are they?", pictures, max_new_tokens=24)
    assert answer.timings.visual_tokens == 12 + 16 + 12

    stock = StockModel.load(read_model_folder(tmp_path / "model"))
    wide, square, tall = (done.each_vision()[index] for index in (1, 0, 2))
    fitted = [
        fit_picture(image, seen.processor.image_processor.settings)
        for image, seen in zip(pictures, (wide, square, tall), strict=True)
    ]
    assert [image.size for image in fitted] == [(96, 32), (64, 64), (32, 96)]
    content = [{"type": "image", "image": image} for image in fitted]
    content.append({"type": "text", "text": "what are they?"})
    inputs = stock.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        found = stock.model.generate(
            **inputs, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert found[0, inputs["input_ids"].shape[1] :].tolist() == list(answer.token_ids)
