"""The shipped models: they load offline, and they look at the picture."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from pocketvlm.reference import REFERENCE_MODELS, reference_model_path
from pocketvlm.reference.architecture import pixel_statistics
from pocketvlm.reference.evaluate import answer_questions, score_model
from pocketvlm.reference.forward import (
    decode_packed,
    look,
    normalise_pixels,
    packed_bias,
)
from pocketvlm.reference.mosaics import GENERATORS, generate_mosaic_examples
from pocketvlm.reference.packing import IGNORED, choose_questions, image_span, pack_questions
from pocketvlm.reference.questions import sample_example_scene
from pocketvlm.reference.scenes import render
from pocketvlm.reference.tokenizer import SCENE_DIALECTS


@pytest.fixture(scope="module", params=REFERENCE_MODELS)
def shipped(request):
    folder = reference_model_path(request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return request.param, model, AutoProcessor.from_pretrained(folder)


def test_an_unknown_model_is_refused_with_the_names_that_exist():
    with pytest.raises(ValueError, match="pocket-llava, pocket-smol"):
        reference_model_path("pocket-large")


def test_weights_are_small_and_in_bfloat16(shipped):
    name, _, _ = shipped
    path = reference_model_path(name) / "model.safetensors"
    assert path.stat().st_size <= 16 * 2**20
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    dtypes = {entry["dtype"] for key, entry in header.items() if key != "__metadata__"}
    assert dtypes == {"BF16"}


def test_widths_suit_groups_of_32(shipped):
    _, model, _ = shipped
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 32 == 0
            assert module.out_features % 32 == 0


def test_answers_come_from_the_picture(shipped):
    name, model, processor = shipped
    scenes = REFERENCE_MODELS[name]
    count, enough = {"reference": (96, 0.85), "mosaics": (48, 0.75)}[scenes]
    examples = list(GENERATORS[scenes](1, count))
    assert score_model(model, processor, iter(examples), batch_size=32).accuracy > enough
    blind = score_model(model, processor, iter(examples), blind=True, batch_size=32)
    assert blind.accuracy < 0.5


def test_small_things_are_read_in_tiles_and_not_in_the_whole():
    folder = reference_model_path("pocket-tiles")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    examples = [e for e in generate_mosaic_examples(1, 160) if e.kind in ("word", "shape")]
    cut = score_model(model, processor, iter(examples), batch_size=20)
    processor.image_processor.do_image_splitting = False
    whole = score_model(model, processor, iter(examples), batch_size=20)
    assert cut.accuracy - whole.accuracy > 0.2, (cut, whole)


def test_a_batch_answers_like_single_questions(shipped):
    name, model, processor = shipped
    examples = list(GENERATORS[REFERENCE_MODELS[name]](2, 8))
    images, questions = [e.image for e in examples], [e.question for e in examples]
    together = answer_questions(model, processor, images, questions)
    alone = [
        answer_questions(model, processor, [image], [question])[0]
        for image, question in zip(images, questions, strict=True)
    ]
    assert together == alone


def test_any_text_survives_the_tokenizer(shipped):
    _, _, processor = shipped
    text = "Où est le 🐙 ?\n\tWhat's 3×4; is it RED?"
    ids = processor.tokenizer(text)["input_ids"]
    assert processor.tokenizer.decode(ids) == text


@pytest.fixture
def seeing_scenes(shipped):
    """Models that see one scene at a time, which packs and training's forward pass are made for."""
    if shipped[0] not in SCENE_DIALECTS:
        pytest.skip("tiles: see test_tiles_training.py")
    return shipped


def test_a_pack_is_what_the_chat_template_writes(seeing_scenes):
    name, _, processor = seeing_scenes
    scene, question = sample_example_scene(0, 3, split="evaluation")
    pack = pack_questions([question], np.random.default_rng(0), name)
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    chat = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
    ]
    prompt = processor.apply_chat_template(chat[:1], add_generation_prompt=True)
    full = processor.apply_chat_template(chat)
    images = [[render(scene)]]
    asked = processor(images=images, text=[prompt], return_tensors="pt")["input_ids"][0].tolist()
    whole = processor(images=images, text=[full], return_tensors="pt")["input_ids"][0].tolist()
    length = int((pack.segments >= 0).sum())
    assert pack.tokens[:length].tolist() == whole
    assert np.flatnonzero(pack.targets != IGNORED)[0] == len(asked) - 1
    assert pack.tokens[image_span(name)].tolist() == [processor.image_token_id] * 64


@pytest.mark.parametrize("turn", [0, -1])
def test_the_training_forward_computes_what_the_model_does(seeing_scenes, turn):
    name, model, processor = seeing_scenes
    scene, _ = sample_example_scene(0, 5, split="evaluation")
    rng = np.random.default_rng(1)
    questions = choose_questions(scene, rng, 5)
    pack = pack_questions(questions, rng, name)
    tokens, segments, positions = (
        torch.from_numpy(a)[None].long() for a in (pack.tokens, pack.segments, pack.positions)
    )
    image = render(scene)
    pixels = normalise_pixels(torch.from_numpy(np.array(image))[None], *pixel_statistics(name))
    text = model.get_decoder() if name == "pocket-llava" else model.model.text_model
    span = image_span(name)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=False):
        tokens_seen = look(model, pixels).tokens
        states = text.embed_tokens(tokens)
        states[:, span] = tokens_seen
        cos, sin = text.rotary_emb(states, positions)
        packed = decode_packed(text.bfloat16(), states.bfloat16(), packed_bias(segments), cos, sin)
        text.float()
    segment = {0: 1, -1: int(segments.max())}[turn]
    own = (segments[0] == 0) | (segments[0] == segment)
    inputs = processor(
        images=[[image]],
        text=[processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])],
        return_tensors="pt",
    )
    torch.testing.assert_close(
        inputs["pixel_values"].flatten(), pixels.flatten(), atol=1e-5, rtol=1e-5
    )
    with torch.inference_mode():
        inputs["input_ids"] = tokens[:, own]
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        whole = model(**inputs).logits[0]
    answers = torch.from_numpy(pack.targets)[own] != IGNORED
    mine = model.lm_head(packed[0, own].float())[answers]
    whole = whole[answers]
    # bfloat16 against float32: the same choice, or one of two that are nearly tied.
    lost = whole.amax(-1) - whole.gather(-1, mine.argmax(-1, keepdim=True))[:, 0]
    assert lost.max() < 0.5
    assert torch.nn.functional.cosine_similarity(mine, whole).min() > 0.98
