"""Which files, names and ties count: what stock transformers makes of a folder is the answer."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pocketvlm.checkpoint import Checkpoint, read_model_folder
from pocketvlm.errors import CheckpointError
from pocketvlm.reference.random_models import tiny_config, write_random_model, write_tiny_model
from tests.conftest import notes_of_ours

LLAVA = {
    "today": {},
    "transformers 4": {
        r"^model\.language_model\.": "language_model.model.",
        r"^lm_head\.": "language_model.lm_head.",
        r"^model\.vision_tower\.": "vision_tower.vision_model.",
        r"^model\.multi_modal": "multi_modal",
    },
    "transformers 4.52": {
        r"^model\.language_model\.": "language_model.",
        r"^model\.vision_tower\.": "vision_tower.vision_model.",
        r"^model\.multi_modal": "multi_modal",
    },
    "text model in a model": {
        r"^model\.language_model\.": "model.language_model.model.",
        r"^model\.vision_tower\.": "model.vision_tower.vision_model.",
    },
    "three models deep": {r"^model\.language_model\.": "language_model.model.model."},
    "base model": {r"^model\.": ""},
    "base model with its own tower": {r"^model\.(vision_tower)\.": r"\1.vision_model."},
}
IDEFICS3 = {"today": {}, "base model": {r"^model\.": ""}}
LAYOUTS = [
    *(("llava", name) for name in LLAVA),
    *((family, name) for family in ("idefics3", "smolvlm") for name in IDEFICS3),
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Tiny models with a separate head, so that every kind of weight is in the files."""
    made = {}
    for family in ("llava", "idefics3", "smolvlm"):
        config = tiny_config("llava" if family == "llava" else "smolvlm")
        config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = False
        if family == "idefics3":
            config["model_type"] = family
            config["architectures"] = ["Idefics3ForConditionalGeneration"]
            config["vision_config"]["model_type"] = "idefics3_vision"
        made[family] = tmp_path_factory.mktemp(family) / family
        write_random_model(config, made[family])
    return made


@pytest.fixture
def llava(paths, tmp_path):
    return shutil.copytree(paths["llava"], tmp_path / "llava")


def rewrite(path, change):
    """Writes the weights again with other content."""
    tensors = load_file(path / "model.safetensors")
    save_file(change(tensors), path / "model.safetensors", metadata={"format": "pt"})


def rename(tensors, patterns):
    renamed = {}
    for name, value in tensors.items():
        found = name
        for pattern, replacement in patterns.items():
            found = re.sub(pattern, replacement, found)
        renamed[found] = value
    return renamed


def edit(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def load_stock(path):
    """The stock class's weights, and names of those that it had to invent."""
    from transformers import AutoModelForImageTextToText

    model, information = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    return model.state_dict(), information["missing_keys"]


def our_weights(checkpoint):
    weights = checkpoint.vectors()
    for name, module in checkpoint.model.named_modules():
        if hasattr(module, "form"):
            weights[f"{name}.weight"] = module.form.dequantize()
    return weights


def assert_stock_s_answer(path):
    """Every weight that is run is the one that the stock class runs."""
    checkpoint, (stock, _) = Checkpoint.load(path), load_stock(path)
    ours = our_weights(checkpoint)
    assert ours.keys() == stock.keys()
    for name, value in stock.items():
        if checkpoint.spec.runs(name):
            assert torch.equal(ours[name], value), name
    return checkpoint


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_names_in_every_layout_that_stock_loads(paths, tmp_path, family, layout):
    path = shutil.copytree(paths[family], tmp_path / "model")
    patterns = (LLAVA if family == "llava" else IDEFICS3)[layout]
    rewrite(path, lambda tensors: rename(tensors, patterns))
    if load_stock(path)[1]:  # an earlier release of the library than the one that mended it
        with pytest.raises(CheckpointError, match="is missing from the weights"):
            Checkpoint.load(path)
        return
    checkpoint = assert_stock_s_answer(path)
    assert notes_of_ours(checkpoint.source.notes) == ()


def test_weights_that_are_never_run_may_be_missing(llava, tmp_path):
    def change(tensors):
        return {
            name: value
            for name, value in tensors.items()
            if "encoder.layers.2." not in name and "post_layernorm" not in name
        }

    whole = Checkpoint.load(llava)
    assert whole.spec.tower.feature_block == 1
    rewrite(llava, change)
    checkpoint = Checkpoint.load(llava)
    (note,) = checkpoint.source.notes
    assert "never run are missing" in note
    for linear in whole.spec.linears():
        expected = whole.form(linear.name).dequantize()
        assert torch.equal(checkpoint.form(linear.name).dequantize(), expected)
    checkpoint.save(tmp_path / "saved")
    assert Checkpoint.load(tmp_path / "saved").source == checkpoint.source


@pytest.mark.parametrize("part", ["encoder.layers.0.mlp.fc1.weight", "pre_layrnorm.weight"])
def test_weights_that_are_run_may_not(llava, part):
    rewrite(llava, lambda tensors: {n: v for n, v in tensors.items() if part not in n})
    with pytest.raises(CheckpointError, match="is missing from the weights"):
        read_model_folder(llava)


def test_buffers_and_surplus_tensors_are_left_out_as_stock_leaves_them(llava):
    extra = {
        "model.vision_tower.embeddings.position_ids": torch.arange(4)[None],
        "model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "visual_projection.weight": torch.ones(2, 2),
        "model.language_model.layers.7.mlp.up_proj.weight": torch.ones(2, 2),
        "model.language_model.layers.0.mlp.up_proj.bias": torch.ones(2),
        "model.language_model.layers.0.mlp.up_proj.weight_scale": torch.ones(2),
    }
    rewrite(llava, lambda tensors: {**tensors, **extra})
    (note,) = assert_stock_s_answer(llava).source.notes
    assert "no place in a llava model" in note
    assert "1 more" in note


@pytest.mark.parametrize("names", ["transformers 4", "transformers 4.52", "base model"])
def test_folds_find_what_they_read_under_former_names(tmp_path, names):
    path = tmp_path / "internvl3"
    write_tiny_model("internvl3", path)
    today = our_weights(Checkpoint.load(path))
    patterns = {**LLAVA[names]}
    if r"^model\.vision_tower\." in patterns:
        patterns[r"^model\.vision_tower\."] = "vision_tower."
    rewrite(path, lambda tensors: rename(tensors, patterns))
    former = our_weights(Checkpoint.load(path))
    assert today.keys() == former.keys()
    assert all(torch.equal(today[name], former[name]) for name in today)


def test_a_scale_that_is_missing_is_not_invented(tmp_path):
    path = tmp_path / "internvl3"
    write_tiny_model("internvl3", path)
    lost = "model.vision_tower.encoder.layer.1.lambda_2"
    rewrite(path, lambda tensors: {k: v for k, v in tensors.items() if k != lost})
    with pytest.raises(CheckpointError, match="layer.1.lambda_2"):
        Checkpoint.load(path)


def test_one_weight_under_two_names(llava):
    name = "model.language_model.norm.weight"
    former = "language_model.model.norm.weight"
    rewrite(llava, lambda tensors: {**tensors, former: tensors[name].clone()})
    assert_stock_s_answer(llava)
    rewrite(llava, lambda tensors: {**tensors, former: tensors[name] + 1})
    with pytest.raises(CheckpointError, match="stand for the same weight, and differ"):
        read_model_folder(llava)


def shard(path, tensors, count, *, index, folder=""):
    """Writes shards, as `save_pretrained` names them."""
    keys = sorted(tensors)
    each = -(-len(keys) // count)
    placed = {}
    for number in range(count):
        name = f"{folder}model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {key: tensors[key].clone() for key in keys[number * each :][:each]}
        (path / name).parent.mkdir(exist_ok=True)
        save_file(part, path / name, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, name)
    if index:
        write_index(path, placed)
    return placed


def write_index(path, placed):
    document = {"metadata": {"total_size": 1}, "weight_map": placed}
    (path / "model.safetensors.index.json").write_text(json.dumps(document))


@pytest.fixture
def sharded(llava):
    """A folder with an index of two shards, beside three shards of an earlier save."""
    tensors = load_file(llava / "model.safetensors")
    (llava / "model.safetensors").unlink()
    shard(llava, {k: v * 0.5 for k, v in tensors.items()}, 3, index=False)
    shard(llava, tensors, 2, index=True)
    return llava


def test_stale_shards_are_not_read(sharded, paths):
    checkpoint = assert_stock_s_answer(sharded)
    (note,) = checkpoint.source.notes
    assert "model-00001-of-00003.safetensors" in note
    used = sorted(sharded.glob("*-of-00002.safetensors"))
    assert checkpoint.source.weight_bytes == sum(file.stat().st_size for file in used)


def test_a_single_file_counts_before_an_index(sharded, paths):
    shutil.copy(paths["llava"] / "model.safetensors", sharded / "model.safetensors")
    rewrite(sharded, lambda tensors: {k: v * 2 for k, v in tensors.items()})
    (note,) = assert_stock_s_answer(sharded).source.notes
    assert "and 3 more" in note


@pytest.mark.parametrize(
    "name",
    [
        "model_old.safetensors",
        "model.fp16.safetensors",
        "consolidated.safetensors",
        "adapter_model.safetensors",
        "original/model.safetensors",
        "pytorch_model.bin",
    ],
)
def test_files_beside_the_weights_are_not_read(llava, name):
    (llava / name).parent.mkdir(exist_ok=True)
    tensors = load_file(llava / "model.safetensors")
    save_file({k: v * 0.5 for k, v in tensors.items()}, llava / name)
    (note,) = assert_stock_s_answer(llava).source.notes
    assert name in note
    (llava / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.load(llava)
    assert "\n" not in str(caught.value)


def test_config_json_may_name_the_file_itself(sharded, paths):
    shutil.copy(paths["llava"] / "model.safetensors", sharded / "chosen.safetensors")
    edit(sharded, transformers_weights="chosen.safetensors")
    assert_stock_s_answer(sharded)
    edit(sharded, transformers_weights="../chosen.safetensors")
    with pytest.raises(CheckpointError, match="not the name of a file inside"):
        Checkpoint.load(sharded)


def test_shards_in_a_folder_of_their_own(llava):
    tensors = load_file(llava / "model.safetensors")
    (llava / "model.safetensors").unlink()
    shard(llava, tensors, 2, index=True, folder="weights/")
    assert assert_stock_s_answer(llava).source.notes == ()


def index_of(change):
    def damage(path):
        file = path / "model.safetensors.index.json"
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return damage


def without(name):
    return lambda path: (path / name).unlink()


def place(name):
    return index_of(lambda index: {**index, "weight_map": {"lm_head.weight": name}})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (index_of(lambda _: {"metadata": {}}), "weight_map is missing"),
        (index_of(lambda _: {"weight_map": {}}), "weight_map is missing"),
        (index_of(lambda _: {"weight_map": ["x"]}), "weight_map is missing"),
        (index_of(lambda _: []), "not an object"),
        (place("../model.safetensors"), "not the name of a file inside"),
        (place("/etc/passwd.safetensors"), "not the name of a file inside"),
        (place("config.json"), "not a [*].safetensors file"),
        (place(3), "not a [*].safetensors file"),
        (place("model-9.safetensors"), "is missing"),
        (without("model-00002-of-00002.safetensors"), "is missing"),
        (without("model.safetensors.index.json"), "neither model.safetensors nor"),
        (
            index_of(
                lambda index: {
                    **index,
                    "weight_map": {**index["weight_map"], "x": "model-00002-of-00002.safetensors"},
                }
            ),
            "lacks tensor x",
        ),
        (lambda path: (path / "model.safetensors.index.json").write_text("{"), "read as JSON"),
    ],
)
def test_a_damaged_index_is_one_line(sharded, damage, message):
    damage(sharded)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_model_folder(sharded)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors.index.json", "model-00002-of-00002.safetensors"),
        *("tokenizer.json", "chat_template.jinja", "processor_config.json"),
    ],
)
def test_pointers_of_git_lfs_are_named(sharded, name):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 7258464\n"
    (sharded / name).write_text(pointer)
    with pytest.raises(CheckpointError, match=f"{name}.*git lfs pull"):
        read_model_folder(sharded)


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.bool, torch.int8, torch.int64],
)
def test_types_that_are_no_weights_are_one_line(llava, dtype):
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    rewrite(llava, lambda tensors: {**tensors, name: torch.ones(tensors[name].shape).to(dtype)})
    with pytest.raises(CheckpointError, match="is of type .*allowed are BF16, F16, F32, F64"):
        read_model_folder(llava)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_float_types_are_read_as_stock_reads_them(llava, dtype):
    rewrite(llava, lambda tensors: {name: value.to(dtype) for name, value in tensors.items()})
    assert_stock_s_answer(llava)


@pytest.mark.parametrize(
    ("at_top", "in_text"), [(True, True), (True, False), (False, True), (None, True)]
)
@pytest.mark.parametrize("holds", ["its own", "the same", "the head alone", "the table alone"])
def test_a_head_is_tied_as_stock_ties_it(llava, tmp_path, at_top, in_text, holds):
    config = json.loads((llava / "config.json").read_text())
    text = {**config["text_config"], "tie_word_embeddings": in_text}
    edit(llava, text_config=text, **({} if at_top is None else {"tie_word_embeddings": at_top}))
    if at_top is None:
        config = json.loads((llava / "config.json").read_text())
        del config["tie_word_embeddings"]
        (llava / "config.json").write_text(json.dumps(config))

    def change(tensors):
        table = "model.language_model.embed_tokens.weight"
        if holds == "the same":
            tensors["lm_head.weight"] = tensors[table].clone()
        elif holds == "the head alone":
            del tensors[table]
        elif holds == "the table alone":
            del tensors["lm_head.weight"]
        return tensors

    rewrite(llava, change)
    checkpoint = assert_stock_s_answer(llava)
    is_own = holds == "its own"
    assert checkpoint.spec.decoder.tied_head is not is_own
    assert any("separate head" in note for note in checkpoint.source.notes) is is_own
    # Saved, rebuilt and loaded again, it is what it was.
    checkpoint.save(tmp_path / "saved")
    saved = Checkpoint.load(tmp_path / "saved")
    for name, value in our_weights(checkpoint).items():
        assert torch.equal(our_weights(saved)[name], value)


@pytest.mark.parametrize("lacking", ["lm_head.weight", "model.language_model.embed_tokens.weight"])
def test_nothing_is_invented_where_config_json_does_not_tie(llava, lacking):
    rewrite(llava, lambda tensors: {k: v for k, v in tensors.items() if k != lacking})
    with pytest.raises(CheckpointError, match=f"{lacking} is missing from the weights"):
        read_model_folder(llava)
