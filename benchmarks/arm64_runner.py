"""The C++ runner, built for ARM64 and emulated, beside the Python runtime on this host.

    python benchmarks/arm64_runner.py RUNNER BUNDLE --libraries FOLDER [--cpu cortex-a76] [--n 8]

RUNNER is cross-compiled as docs/native_runners.md says; FOLDER holds ARM64's libjpeg and libpng.
ONNX Runtime's library is that of the environment's wheel. Printed is how many answers are the same
token for token; kernels of another instruction set may choose otherwise where tokens nearly tie.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from pocketvlm.bundle import Bundle
from pocketvlm.context import RunContext
from pocketvlm.device_bench.controller.prompts import render_turns
from pocketvlm.device_bench.protocol import Turn
from pocketvlm.emulation.arm64.emulator import DEFAULT_CPU, Emulator
from pocketvlm.emulation.arm64.prepare import open_emulator
from pocketvlm.pipeline.questions import Questions, choose_samples
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.text import TextCodec


def ask_runner(
    emulator: Emulator, options: argparse.Namespace, turn: Turn, picture: Path
) -> tuple[list[int], str]:
    """Tokens of the emulated runner, without the one that ends the answer, and its text."""
    site = emulator.environment.site
    (library,) = (site / "onnxruntime" / "capi").glob("libonnxruntime.so.*")
    words = ["--onnxruntime", library, options.bundle, "--image", picture, "--rendered"]
    words += [turn.rendered, "--max-new-tokens", options.tokens, "--json"]
    variables = emulator.variables() | {"LD_LIBRARY_PATH": str(options.libraries)}
    finished = subprocess.run(
        emulator.command(options.runner, *map(str, words)),
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(finished.stdout)
    return found["token_ids"], found["text"]


def main() -> None:
    """Prints a line per answer that differs, and the counts as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runner", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--libraries", type=Path, required=True)
    parser.add_argument("--cpu", default=DEFAULT_CPU)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--data")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    emulator = open_emulator(RunContext(), cpu=options.cpu, prepare=False)
    codec, conversation = TextCodec.from_bundle(bundle), Conversation(bundle)
    same, asked = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        for sample in choose_samples(bundle, Questions(data=options.data, n=options.n)):
            sample.open_image().save(picture)
            conversation.reset()
            here = conversation.ask(sample.question, picture, max_new_tokens=options.tokens)
            (turn,) = render_turns(codec, [Turn(text=sample.question, pictures=(0,))])
            tokens, text = ask_runner(emulator, options, turn, picture)
            asked += 1
            if tuple(tokens) == here.token_ids:
                same += 1
            else:
                print(f"{sample.where}: {text!r} emulated, {here.text!r} here", flush=True)
    print(f"{same} of {asked} answers are the same", flush=True)
    print(json.dumps({"cpu": options.cpu, "qemu": emulator.version(), "n": asked, "same": same}))


if __name__ == "__main__":
    main()
