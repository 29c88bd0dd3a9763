"""Runs ORT-GenAI for `decode_speed.py`, in the environment that has it; see there.

Exports the text decoder of a SmolVLM-shaped model with ORT-GenAI's own builder (int4, its
defaults, accuracy level 4), then answers lines of `answer PROMPT NEW` with one JSON line each.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

# This environment need not hold pocketvlm, which sets it otherwise.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime_genai as og  # noqa: TID251  (after the line above)


def write_text_decoder(model: Path, folder: Path) -> None:
    """Writes the text decoder of a vision-language model as a Llama of the same weights."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(exist_ok=True)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"] | {
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(text), encoding="utf-8")
    prefix = "model.text_model."
    tensors = {
        name.replace(prefix, "model."): tensor
        for name, tensor in load_file(model / "model.safetensors").items()
        if name.startswith((prefix, "lm_head."))
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(model / name, folder / name)


def export(model: Path, folder: Path) -> None:
    """Has ORT-GenAI's builder export the decoder."""
    source = model.with_name(model.name + "-text")
    write_text_decoder(model, source)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(source)]
    command += ["-o", str(folder), "-p", "int4", "-e", "cpu"]
    command += ["--extra_options", "int4_accuracy_level=4"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run(model: og.Model, prompt: int, new: int, clock: Callable[[], float]) -> dict[str, object]:
    """One prefill and `new` tokens: milliseconds of each."""
    parameters = og.GeneratorParams(model)
    length = prompt + new + 2
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    ids = np.random.default_rng(0).integers(10, 40_000, prompt).astype(np.int32)
    start = clock()
    generator.append_tokens(ids)
    generator.generate_next_token()
    prefill = clock() - start
    steps = []
    for _ in range(new):
        start = clock()
        generator.generate_next_token()
        steps.append((clock() - start) * 1e3)
    return {"prefill_ms": prefill * 1e3, "step_ms": steps}


def main() -> None:
    """Exports once, then serves rounds until its input ends."""
    model, threads = Path(sys.argv[1]), int(sys.argv[2])
    clock = time.process_time if sys.argv[3] == "cpu" else time.perf_counter
    folder = model.with_name(model.name + "-genai")
    if not (folder / "genai_config.json").is_file():
        export(model, folder)
    config = og.Config(str(folder))
    options = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    loaded = og.Model(config)
    print("ready", flush=True)
    for line in sys.stdin:
        _, prompt, new = line.split()
        print(json.dumps(run(loaded, int(prompt), int(new), clock)), flush=True)


if __name__ == "__main__":
    main()
