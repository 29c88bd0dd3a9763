"""A stranger's model folder runs no code, fetches nothing, starts nothing and is read alone."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pocketvlm
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.checkpoint.folder import read_model_folder
from pocketvlm.errors import CheckpointError
from pocketvlm.processor import Processor
from pocketvlm.processor.foreign_code import plain_config
from pocketvlm.reference_graph.forward import decode_logits, embed_prompts

CODE = "import pathlib; pathlib.Path({mark!r}).write_text('ran')\nclass X: pass\n"

CONFIGURATIONS = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "video_preprocessor_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "adapter_config.json",
    "config.4.50.0.json",
)


@pytest.fixture
def copy(tiny_path, tmp_path):
    folder = shutil.copytree(tiny_path, tmp_path / "model")
    (folder / "strange.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    return folder


def change(file: Path, **keys) -> None:
    document = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**document, **keys}))


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize(
    "keys",
    [
        {"auto_map": {"AutoImageProcessor": "strange.X", "AutoTokenizer": ["strange.X", None]}},
        {"image_processor": {"auto_map": {"AutoImageProcessor": "owner/repo--strange.X"}}},
        {"a": [{"b": {"auto_map": {"AutoProcessor": "strange.X"}}}]},
        {"custom_pipelines": {"task": {"impl": "strange.X"}}},
        {"any_key": "owner/repo--strange.X"},
    ],
    ids=["top", "nested", "deep", "pipelines", "value"],
)
def test_code_is_refused_wherever_it_is_asked_for(copy, tmp_path, name, keys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    change(copy / name, **keys)
    with pytest.raises(CheckpointError, match=rf"{name}: needs its own code \(.*never run") as e:
        Checkpoint.load(copy)
    assert "\n" not in str(e.value)
    with pytest.raises(CheckpointError, match="needs its own code"):
        read_model_folder(copy)
    assert not (tmp_path / "ran").exists()


def test_the_processor_alone_refuses_it_too(copy, tiny_checkpoint):
    change(copy / "processor_config.json", auto_map={"AutoImageProcessor": "strange.X"})
    with pytest.raises(CheckpointError, match=r"processor_config.json: needs its own code"):
        Processor.load(copy, tiny_checkpoint.spec)


def test_words_of_a_vocabulary_are_no_code(copy):
    document = json.loads((copy / "tokenizer.json").read_text())
    document["model"].setdefault("vocab", {})
    (copy / "vocab.json").write_text(json.dumps({"auto_map": 1, "owner/repo--a.B": 2}))
    (copy / "notes.json").write_text("{ broken")  # nobody's configuration
    (copy / "empty.json").write_text(json.dumps({"auto_map": {}}))
    Checkpoint.load(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json", "config.json"])
def test_a_file_that_leads_elsewhere_is_refused(copy, tmp_path, name):
    file = copy / name
    if file.exists():
        file.rename(tmp_path / "outside")
    else:
        (tmp_path / "outside").write_text("{}")
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match=f"{name}: leads out of its folder"):
        Checkpoint.load(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "config.json"])
def test_a_pointer_of_git_lfs_is_named(copy, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (copy / name).write_text(pointer)
    with pytest.raises(CheckpointError, match=f"{name}: is a pointer of git-lfs"):
        Checkpoint.load(copy)


def test_a_pipe_is_refused_without_waiting(copy):
    os.mkfifo(copy / "chat_template.json")
    with pytest.raises(CheckpointError, match=r"chat_template.json: is not a regular file"):
        Checkpoint.load(copy)


KERNELS = {
    "attn_implementation": "owner/kernel:function",
    "_attn_implementation": "kernels-community/flash-attn",
    "_attn_implementation_internal": "flash_attention_2",
    "experts_implementation": "owner/kernel",
    "use_kernels": True,
    "kernel_config": {"x": "owner/kernel"},
}


def test_kernels_are_taken_out_at_every_depth_and_told():
    config, notes = plain_config(
        {**KERNELS, "text_config": {**KERNELS, "depth": 2}, "a": [KERNELS]}
    )
    assert config == {"text_config": {"depth": 2}, "a": [{}]}
    assert len(notes) == 3 * len(KERNELS)
    assert "config.json: text_config.attn_implementation asks for 'owner/kernel" in notes[6]
    assert plain_config({"_attn_implementation": "sdpa", "attn_implementation": None}) == ({}, ())


def test_a_model_that_asks_for_kernels_is_the_stock_model(copy, tiny_checkpoint):
    config = json.loads((copy / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part.update(KERNELS)
    (copy / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.load(copy)
    assert any(
        "asks for 'owner/kernel:function', which is ignored" in note
        for note in checkpoint.source.notes
    )
    assert not KERNELS.keys() & checkpoint.config.keys()
    ids = torch.tensor([[3, 4, 5]])
    found, expected = (
        decode_logits(one, embed_prompts(one, ids, None)) for one in (checkpoint, tiny_checkpoint)
    )
    assert torch.equal(found, expected)


WATCH = """
import json, os, sys
sys.path.insert(0, {root!r})
import pocketvlm
from pocketvlm.checkpoint import Checkpoint
Checkpoint.load({sound!r})  # imports everything that loading a model needs
seen = []
OTHER = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.",
         "webbrowser.", "urllib.", "ctypes.dlopen")
def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        seen.append("open " + os.path.realpath(os.fsdecode(args[0])))
    elif event.startswith(OTHER) or (event == "import" and "strange" in str(args[0])):
        seen.append(event + " " + repr(args)[:200])
sys.addaudithook(hook)
for folder in {folders!r}:
    try:
        Checkpoint.load(folder)
        print("loaded")
    except Exception as error:
        print(type(error).__name__, str(error)[:300])
print(json.dumps(seen))
"""

OUTSIDE = "/etc/hostname"

DOORS = {
    "tokenizer_config.json": {
        "tokenizer_file": OUTSIDE,
        "vocab_file": OUTSIDE,
        "merges_file": OUTSIDE,
        "spm_file": OUTSIDE,
        "special_tokens_map_file": OUTSIDE,
        "added_tokens_file": OUTSIDE,
        "chat_template_file": OUTSIDE,
        "name_or_path": "owner/repo",
        "_commit_hash": "0",
        "fast_tokenizer_files": ["../../outside.json", OUTSIDE],
        "init_inputs": [],
        "processor_class": "strange.X",
    },
    "config.json": {
        **KERNELS,
        "_name_or_path": OUTSIDE,
        "name_or_path": "owner/repo",
        "dtype": "hub",
        "torch_dtype": "float64",
        "backbone": "owner/repo",
        "use_pretrained_backbone": True,
        "use_timm_backbone": True,
        "tokenizer_class": "strange.X",
        "base_model_name_or_path": "owner/repo",
        "configuration_files": ["config.9.json", OUTSIDE],
        "quantization_config_file": OUTSIDE,
    },
    "adapter_config.json": {"base_model_name_or_path": "owner/repo", "peft_type": "LORA"},
    "generation_config.json": {
        "cache_implementation": "strange",
        "assistant_model": "owner/repo",
        "custom_generate": "owner/repo",
    },
    "processor_config.json": {"processor_class": "strange.X", "image_processor_filename": OUTSIDE},
    "preprocessor_config.json": {"processor_class": "strange.X", "feature_extractor_type": "x"},
}


def test_no_setting_opens_a_file_elsewhere_or_a_socket(tiny_path, tmp_path):
    folders = []
    for name, keys in DOORS.items():
        folders.append(str(shutil.copytree(tiny_path, tmp_path / name.partition(".")[0])))
        (Path(folders[-1]) / "strange.py").write_text("class X: pass\n")
        change(Path(folders[-1]) / name, **keys)
    script = WATCH.format(
        root=str(Path(pocketvlm.__file__).parent.parent), sound=str(tiny_path), folders=folders
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "0"},
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    inside = (*folders, sys.prefix, sys.base_prefix, str(Path(pocketvlm.__file__).parent))
    harmless = ("/dev/null", "/proc/", "/sys/")
    known = tuple(f"open {os.path.realpath(place)}" for place in (*inside, *harmless))
    for folder in folders:
        assert any(event.startswith(f"open {folder}/") for event in seen), done.stdout
    assert [event for event in seen if not event.startswith(known)] == [], done.stdout


def test_every_call_that_loads_from_a_folder_says_so():
    """A new call without these arguments would let code in again."""
    root = Path(pocketvlm.__file__).parent
    calls = 0
    for file in (*root.rglob("*.py"), *(root.parent / "benchmarks").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner, words = ast.unparse(node.func.value), ast.unparse(node)
            if node.func.attr == "from_pretrained":
                assert "**STOCK_ONLY" in words, f"{file}: {words}"
                calls += 1
            elif node.func.attr == "from_config" and owner.startswith("Auto"):
                assert "trust_remote_code=False" in words, f"{file}: {words}"
                assert "attn_implementation=" in words, f"{file}: {words}"
                calls += 1
            assert "trust_remote_code=True" not in words
    assert calls >= 6
