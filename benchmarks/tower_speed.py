"""How fast is the tower of a bundle, by the kernels of its products, and what is left of it?

    python benchmarks/tower_speed.py --work shapes --threads 1 [--openvino VENV/bin/python]

The vision graphs of SmolVLM-256M's shape, random weights, in float32 and in int8 in groups of 32
and with one scale per row, take turns. Prints medians of wall and processor time with shares of
float32 (a share is the median over rounds), where the time of each graph goes by operator, and one
JSON line with every raw sample. Processor time tells the same on a busy machine as long as there is
one thread. `--openvino` names the interpreter of an environment for `openvino_worker.py`, whose
towers take turns with ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from peer_process import Peer, started_peer

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.affine.rtn import round_to_nearest
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.context import RunContext
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.files.publish import replace_directory
from pocketvlm.machine import describe_environment
from pocketvlm.reference.random_models import write_shape
from pocketvlm.reference.shapes import load_shape
from pocketvlm.runtime.onnx.engine import onnxruntime, require_exact_sums

_SHAPE = "smolvlm-256m"
_RULES = {
    "float32": WeightRule(bits=None),
    "int8 g32": WeightRule(bits=8),
    "int8 rows": WeightRule(bits=8, group_size=None, symmetric=True),
}
_PROFILED = 3
_OPENVINO = {"weights": "OpenVINO, int8 weights", "both": "OpenVINO, int8 both"}


def write_graphs(rule: WeightRule, folder: Path) -> Path:
    """Rounds tower and projector of a random model, and exports it, unless that was done before."""
    if folder.is_dir():
        return folder
    model = write_shape(load_shape(_SHAPE), folder.parent / _SHAPE, is_split=False)
    checkpoint = Checkpoint.load(model)
    for linear in checkpoint.spec.linears():
        if linear.part in ("tower", "projector") and not rule.keeps_float:
            form, _ = round_to_nearest(
                checkpoint.form(linear.name),
                scheme=rule.scheme,
                group_size=rule.columns_a_group(linear.in_features),
            )
            checkpoint.set_form(linear.name, form)
    with replace_directory(folder) as aside:
        ToOnnx().export(checkpoint, aside, RunContext())
    return folder


def open_vision(
    folder: Path, threads: int, profile: Path | None = None
) -> onnxruntime.InferenceSession:
    """A session of a bundle's vision graph, set as the runner sets it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_mem_pattern = False
    require_exact_sums(options)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(
        folder / "onnx" / "vision.onnx", options, providers=["CPUExecutionProvider"]
    )


def operator_shares(
    folder: Path, threads: int, pixels: np.ndarray[Any, np.dtype[np.float32]]
) -> dict[str, float]:
    """Share of the time in nodes, by operator, the largest first."""
    with tempfile.TemporaryDirectory() as name:
        session = open_vision(folder, threads, Path(name) / "profile")
        for _ in range(_PROFILED):
            session.run(None, {"pixel_values": pixels})
        events = json.loads(Path(session.end_profiling()).read_text())
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    total = sum(spent.values())
    return {operator: time_us / total for operator, time_us in spent.most_common()}


def run_session(
    session: onnxruntime.InferenceSession, pixels: np.ndarray[Any, np.dtype[np.float32]]
) -> dict[str, float]:
    """One tile: wall and processor time."""
    wall, processor = time.perf_counter(), time.process_time()
    session.run(None, {"pixel_values": pixels})
    return {
        "processor_ms": (time.process_time() - processor) * 1e3,
        "wall_ms": (time.perf_counter() - wall) * 1e3,
    }


def main() -> None:
    """Writes the bundles, lets their towers run in turns, prints medians and shares."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and bundles")
    parser.add_argument("--openvino", type=Path, help="interpreter for openvino_worker.py")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folders = {
        name: write_graphs(rule, options.work / f"tower-{name.replace(' ', '-')}")
        for name, rule in _RULES.items()
    }
    sessions = {name: open_vision(folder, options.threads) for name, folder in folders.items()}
    shape = sessions["float32"].get_inputs()[0].shape
    pixels = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    arms: dict[str, Callable[[], dict[str, float]]] = {
        name: partial(run_session, session, pixels) for name, session in sessions.items()
    }
    with ExitStack() as stack:
        if options.openvino:
            peer = stack.enter_context(
                started_peer(
                    options.openvino,
                    "openvino_worker.py",
                    options.work / _SHAPE,
                    threads=options.threads,
                    clock="wall",
                )
            )
            for kind, name in _OPENVINO.items():
                arms[name] = partial(_ask_tower, peer, kind)
        samples = take_turns(arms, options.rounds)
    del arms, sessions
    print(f"{_SHAPE}, {options.threads} threads, {options.rounds} rounds in turns\n")
    document: dict[str, Any] = {
        "shape": _SHAPE,
        "environment": describe_environment(options.threads),
        "samples": samples,
    }
    for name, taken in samples.items():
        shares = {
            clock: statistics.median(
                mine / theirs
                for mine, theirs in zip(values, samples["float32"][clock], strict=True)
            )
            for clock, values in taken.items()
        }
        folder = folders.get(name)
        spent = {} if folder is None else operator_shares(folder, options.threads, pixels)
        document[name] = {"share": shares, "operators": spent}
        times = ", ".join(
            f"{clock} {statistics.median(values):.0f} ({shares[clock]:.2f})"
            for clock, values in taken.items()
        )
        where = ", ".join(f"{operator} {share:.0%}" for operator, share in list(spent.items())[:4])
        print(f"{name:24s} {times}" + (f"; {where}" if where else ""))
    print(json.dumps(document))


def take_turns(
    arms: dict[str, Callable[[], dict[str, float]]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Samples of every arm by clock; a first round warms up."""
    samples: dict[str, dict[str, list[float]]] = {
        name: {"processor_ms": [], "wall_ms": []} for name in arms
    }
    for turn in range(rounds + 1):
        for name, run in arms.items():
            taken = run()
            if turn:
                for clock, value in taken.items():
                    samples[name][clock].append(value)
    return samples


def _ask_tower(peer: Peer, kind: str) -> dict[str, float]:
    return peer.ask("tower", kind)


if __name__ == "__main__":
    main()
