"""Runs OpenVINO for `decode_speed.py` and `tower_speed.py`, in the environment that has it.

    python -m venv env && env/bin/pip install "optimum-intel[openvino]" nncf

Exports a model of SmolVLM's shape with `optimum-cli` to int4 in groups of 64, head and embedding in
int8 (its defaults), the tower's weights in int8; and that tower once more with int8 activations, as
nncf's post-training quantization makes it. Then answers lines with one JSON line each:

- `answer PROMPT NEW`: a prefill and greedy tokens, milliseconds of each
- `tower weights|both`: one tile through tower and projector, milliseconds
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"

_TOWER = "openvino_vision_embeddings_model.xml"
_BOTH = "tower-int8.xml"
_TILES = 4


def export(model: Path, folder: Path) -> None:
    """Has optimum-intel export all graphs."""
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino"]
    command += ["-m", str(model), "--task", "image-text-to-text", "--weight-format"]
    words = subprocess.DEVNULL
    for weights, name in (
        (["int4", "--group-size", "64", "--ratio", "1.0"], folder),
        (["fp32"], folder.with_name(folder.name + "-float")),
    ):
        subprocess.run([*command, *weights, str(name)], check=True, stdout=words, stderr=words)


def quantize_tower(core: Any, vision: dict[str, Any], floating: Path, out: Path) -> None:
    """Rounds weights and activations of the float tower to int8, on random tiles."""
    import nncf
    import openvino

    tower = core.read_model(floating / _TOWER)
    random = np.random.default_rng(1)
    tiles = [tower_inputs(tower, vision, random) for _ in range(_TILES)]
    quantized = nncf.quantize(
        tower, nncf.Dataset(tiles), model_type=nncf.ModelType.TRANSFORMER, subset_size=_TILES
    )
    openvino.save_model(quantized, out)


def tower_inputs(tower: Any, vision: dict[str, Any], random: np.random.Generator) -> dict[str, Any]:
    """One tile and what goes with it."""
    size, side = vision["image_size"], vision["image_size"] // vision["patch_size"]
    given: dict[str, Any] = {}
    for port in tower.inputs:
        name = port.get_any_name()
        if name == "pixel_values":
            given[name] = random.standard_normal((1, 3, size, size)).astype(np.float32)
        elif name == "patch_attention_mask":
            given[name] = np.ones((1, side, side), bool)
        else:  # where each of the patches lies
            given[name] = np.arange(side * side, dtype=np.int64)[None]
    return given


class Worker:
    """Compiled graphs."""

    def __init__(self, folder: Path, vision: dict[str, Any], settings: dict[str, Any]) -> None:
        """Compiles the graphs of an export.

        Args:
            folder: What `export` wrote.
            vision: The tower's configuration.
            settings: Settings of the CPU device.
        """
        import openvino

        core = openvino.Core()
        if not (folder / _BOTH).is_file():
            quantize_tower(core, vision, folder.with_name(folder.name + "-float"), folder / _BOTH)

        def compiled(name: str) -> Any:
            return core.compile_model(folder / name, "CPU", settings)

        self.towers = {"weights": compiled(_TOWER), "both": compiled(_BOTH)}
        self.embedding = compiled("openvino_text_embeddings_model.xml").create_infer_request()
        self.decoder = compiled("openvino_language_model.xml").create_infer_request()
        self.asks = {
            name: tower_inputs(tower, vision, np.random.default_rng(0))
            for name, tower in self.towers.items()
        }
        self.requests = {name: tower.create_infer_request() for name, tower in self.towers.items()}

    def tower(self, kind: str) -> dict[str, float]:
        """One tile: wall and processor time."""
        wall, processor = time.perf_counter(), time.process_time()
        self.requests[kind].infer(self.asks[kind], share_inputs=True)
        return {
            "processor_ms": (time.process_time() - processor) * 1e3,
            "wall_ms": (time.perf_counter() - wall) * 1e3,
        }

    def step(self, ids: np.ndarray[Any, Any], past: int) -> int:
        """Runs rows, and returns the likeliest next token."""
        rows = ids.shape[1]
        embeds = self.embedding.infer([ids], share_inputs=True, share_outputs=True)[0]
        asked = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, past + rows), np.int64),
            "position_ids": np.arange(past, past + rows, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        logits = self.decoder.infer(asked, share_inputs=True, share_outputs=True)["logits"]
        return int(logits[0, -1].argmax())

    def answer(self, prompt: int, new: int, clock: Any) -> dict[str, object]:
        """A prefill and greedy tokens: milliseconds of each."""
        ids = np.random.default_rng(0).integers(10, 40_000, (1, prompt))
        self.decoder.reset_state()
        start = clock()
        token = self.step(ids, 0)
        prefill = clock() - start
        steps = []
        for position in range(prompt, prompt + new):
            start = clock()
            token = self.step(np.array([[token]]), position)
            steps.append((clock() - start) * 1e3)
        return {"prefill_ms": prefill * 1e3, "step_ms": steps}


def main() -> None:
    """Exports once, then serves rounds until its input ends."""
    model, threads = Path(sys.argv[1]), int(sys.argv[2])
    clock = time.process_time if sys.argv[3] == "cpu" else time.perf_counter
    folder = model.with_name(model.name + "-openvino")
    if not (folder / "openvino_language_model.xml").is_file():
        export(model, folder)
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    worker = Worker(folder, config["vision_config"], settings)
    print("ready", flush=True)
    for line in sys.stdin:
        kind, *words = line.split()
        if kind == "tower":
            print(json.dumps(worker.tower(words[0])), flush=True)
        else:
            prompt, new = map(int, words)
            print(json.dumps(worker.answer(prompt, new, clock)), flush=True)


if __name__ == "__main__":
    main()
