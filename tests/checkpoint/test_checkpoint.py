from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pocketvlm.checkpoint import Checkpoint, StageRecord, read_spec
from pocketvlm.errors import CheckpointError, StorageError, UnsupportedError
from pocketvlm.files.signed_folder import sign_document
from pocketvlm.reference.random_models import tiny_config
from pocketvlm.weights.affine import AffineWeight


@pytest.fixture
def copy(tiny_path, tmp_path):
    return shutil.copytree(tiny_path, tmp_path / "model")


def quantize_crudely(form):
    """Any valid codes do: what is tested is that they survive."""
    dense = form.dequantize()
    rows, columns = dense.shape
    groups = -(-columns // 32)
    padded = torch.zeros(rows, groups * 32)
    padded[:, :columns] = dense
    blocks = padded.view(rows, groups, 32)
    scales = (blocks.abs().amax(-1) / 7 + 1e-4).half()
    codes = (blocks / scales.float()[..., None]).round().clamp(-8, 7) + 8
    return AffineWeight.from_codes(
        codes.view(rows, -1), scales, None, bits=4, group_size=32, in_features=columns
    )


def test_a_saved_checkpoint_comes_back_whole(tiny_checkpoint, tmp_path):
    linear = tiny_checkpoint.spec.linears()[-1]
    tiny_checkpoint.set_form(linear.name, quantize_crudely(tiny_checkpoint.form(linear.name)))
    record = StageRecord(
        method="test",
        parameters={"bits": 4},
        version="0",
        calibration_sha256=None,
        layers=({"name": linear.name, "seconds": 1.5},),
        notes=("something",),
        seconds=3.0,
    )
    tiny_checkpoint.extend(record).save(tmp_path / "saved")
    again = Checkpoint.load(tmp_path / "saved")
    assert again.source == tiny_checkpoint.source
    assert again.history[0].notes == ("something",)
    for name, form in tiny_checkpoint.forms().items():
        assert torch.equal(again.form(name.name).dequantize(), form.dequantize())
    assert isinstance(again.form(linear.name), AffineWeight)


def test_saving_twice_gives_the_same_bytes_whatever_the_clock_said(tiny_checkpoint, tmp_path):
    for index, seconds in enumerate((1.0, 2.0)):
        record = StageRecord(
            method="test",
            parameters={},
            version="0",
            calibration_sha256=None,
            layers=({"name": "a", "seconds": seconds},),
            seconds=seconds,
            peak_rss_bytes=int(seconds),
        )
        tiny_checkpoint.extend(record).save(tmp_path / str(index))
    first, second = (sorted((tmp_path / str(i)).iterdir()) for i in range(2))
    assert [f.name for f in first] == [f.name for f in second]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))


def test_a_tied_head_follows_its_embedding(tiny_paths):
    checkpoint = Checkpoint.load(tiny_paths["llava"])
    decoder = checkpoint.spec.decoder
    form = quantize_crudely(checkpoint.form(decoder.embedding))
    checkpoint.set_form(decoder.embedding, form)
    assert checkpoint.form(decoder.head) is form


def test_a_failed_save_leaves_what_was_there(tiny_checkpoint, tmp_path, monkeypatch):
    tiny_checkpoint.save(tmp_path / "saved")
    before = (tmp_path / "saved" / "model.safetensors").read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pocketvlm.checkpoint.save.save_file", full_disk)
    with pytest.raises(StorageError, match="No space"):
        tiny_checkpoint.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def remove(name):
    return lambda path: (path / name).unlink()


def truncate(path):
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def flip_header(path):
    weights = path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[20] ^= 0xFF
    weights.write_bytes(bytes(content))


def poison(path):
    tensors = load_file(path / "model.safetensors")
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path / "model.safetensors")


def drop_tensor(path):
    tensors = load_file(path / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("norm.weight"))]
    save_file(tensors, path / "model.safetensors")


def pickle_weights(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def edit_config(**changes):
    def edit(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def garble_tokenizer(path):
    (path / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "config.json is missing"),
        (remove("model.safetensors"), "no [*].safetensors here"),
        (remove("tokenizer.json"), "tokenizer.json is missing"),
        (remove("preprocessor_config.json"), "preprocessor_config.json"),
        (remove("chat_template.jinja"), "no chat template"),
        (truncate, "truncated or damaged"),
        (flip_header, "truncated or damaged"),
        (poison, "not finite"),
        (drop_tensor, "is missing from the weights"),
        (pickle_weights, "pickled weights can run code.*save_pretrained"),
        (edit_config(auto_map={"AutoModel": "x.Y"}), "auto_map"),
        (garble_tokenizer, "tokenizer cannot be read"),
    ],
)
def test_damaged_directories_get_one_line(copy, damage, message):
    damage(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.load(copy)
    assert "\n" not in str(caught.value)


def test_a_config_may_leave_out_what_its_class_has_as_default():
    """The published LLaVA-1.5 config names no widths at all."""
    spec = read_spec(
        {
            "model_type": "llava",
            "image_token_index": 32000,
            "text_config": {"model_type": "llama", "vocab_size": 32064},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
            },
        }
    )
    assert spec.visual_tokens == 576
    assert spec.tower.feature_block == 22
    assert (spec.decoder.hidden_size, spec.decoder.depth) == (4096, 32)
    weights = sum(linear.out_features * linear.in_features for linear in spec.linears())
    assert weights == pytest.approx(7.05e9, rel=0.01)


def test_a_config_of_wrong_types_is_one_line():
    with pytest.raises(CheckpointError, match="cannot be understood") as caught:
        read_spec({**tiny_config("llava"), "text_config": "llama"})
    assert "\n" not in str(caught.value)


def test_an_unsupported_family_names_the_supported_ones(copy):
    edit_config(model_type="bert")(copy)
    with pytest.raises(UnsupportedError, match="supported are llava"):
        Checkpoint.load(copy)


def test_a_flipped_bit_in_any_file_of_our_own_is_noticed(tiny_checkpoint, tmp_path):
    tiny_checkpoint.save(tmp_path / "saved")
    files = sorted((tmp_path / "saved").iterdir())
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} < {
        file.name for file in files
    }
    for file in files:
        before = file.read_bytes()
        content = bytearray(before)
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))
        with pytest.raises(CheckpointError, match=rf"{file.name}: .*"):
            Checkpoint.load(tmp_path / "saved")
        file.write_bytes(before)
    Checkpoint.load(tmp_path / "saved")


def test_the_history_of_our_own_checkpoint_is_signed(tiny_checkpoint, tmp_path):
    record = StageRecord(method="m", parameters={}, version="1", calibration_sha256=None)
    tiny_checkpoint.extend(record).save(tmp_path / "saved")
    manifest = tmp_path / "saved" / "pocketvlm.json"
    manifest.write_text(manifest.read_text().replace('"method": "m"', '"method": "n"'))
    with pytest.raises(CheckpointError, match=r"pocketvlm.json: was changed after it was written"):
        Checkpoint.load(tmp_path / "saved")


def test_a_file_that_was_not_saved_with_our_own_checkpoint_is_refused(tiny_checkpoint, tmp_path):
    tiny_checkpoint.save(tmp_path / "saved")
    (tmp_path / "saved" / "added_tokens.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"added_tokens.json: is not listed in pocketvlm"):
        Checkpoint.load(tmp_path / "saved")


def test_an_earlier_version_of_our_own_checkpoint_is_refused(tiny_checkpoint, tmp_path):
    tiny_checkpoint.save(tmp_path / "saved")
    manifest = tmp_path / "saved" / "pocketvlm.json"
    document = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**document, "schema": 1}))
    with pytest.raises(CheckpointError, match="schema 1; this version reads 2, where every file"):
        Checkpoint.load(tmp_path / "saved")
    del document["sha256"]  # nor is the digest optional
    manifest.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="this version reads 2"):
        Checkpoint.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": {}}, "source.name: is missing"),
        ({"forms": []}, "forms: must be an object"),
        ({"forms": {"x": 1}}, "forms.x: must be an object"),
        ({"history": [{}]}, "history.0.method: is missing"),
        ({"history": 3}, "history: must be a list"),
        ({"reducer": {"method": "m"}}, "reducer.parameters: is missing"),
        ({"reducer": {"method": "m", "parameters": {}}}, "'m', which is not known here"),
        ({"files": {"../x": "0" * 64}}, "not the name of a file inside"),
        ({"files": {}}, "lists no files"),
        ({"extra": 1}, "extra: unknown key"),
    ],
)
def test_a_hostile_manifest_gets_one_line(tiny_checkpoint, tmp_path, change, message):
    tiny_checkpoint.save(tmp_path / "saved")
    manifest = tmp_path / "saved" / "pocketvlm.json"
    document = {**json.loads(manifest.read_text()), **change}
    manifest.write_text(json.dumps(sign_document(document)))
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.load(tmp_path / "saved")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "form", [{"kind": "odd"}, {}, {"kind": "affine"}, {"kind": "affine", "shared": [1]}]
)
def test_a_form_that_does_not_fit_its_tensors_gets_one_line(tiny_checkpoint, tmp_path, form):
    tiny_checkpoint.save(tmp_path / "saved")
    manifest = tmp_path / "saved" / "pocketvlm.json"
    document = json.loads(manifest.read_text())
    document["forms"][tiny_checkpoint.spec.linears()[0].name] = form
    manifest.write_text(json.dumps(sign_document(document)))
    with pytest.raises(CheckpointError, match=r"of kind|shared: must be an object") as caught:
        Checkpoint.load(tmp_path / "saved")
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_a_hub_cache_is_noticed(tiny_path, tmp_path):
    """A hub cache names each blob by its digest."""
    from pocketvlm.files.reader import file_sha256

    model = shutil.copytree(tiny_path, tmp_path / "models--a--b" / "snapshots" / "c")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for file in model.iterdir():  # every file of a snapshot is a link
        blob = blobs / file_sha256(file)
        file.rename(blob)
        file.symlink_to(f"../../blobs/{blob.name}")
    blob = (model / "model.safetensors").resolve()
    Checkpoint.load(model)
    content = bytearray(blob.read_bytes())
    content[-5] ^= 1
    blob.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="is damaged: sha256"):
        Checkpoint.load(model)


def test_a_path_that_is_no_directory_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        Checkpoint.load(tmp_path / "nothing")


def test_loading_costs_no_more_memory_than_the_file_stores(tiny_checkpoint):
    for form in tiny_checkpoint.forms().values():
        assert form.to_tensors()["weight"].dtype == torch.bfloat16
