"""How often a native runner generates exactly the tokens of the Python runtime.

    python benchmarks/native_agreement.py --runner "build/cpp/pocketvlm-runner" BUNDLE [BUNDLE ...]

The command of the runner may have more words, such as an emulator before it and
`--onnxruntime FILE` after it. Every question is asked about a held-out scene, and is followed by a
second turn about the same picture. Prints one line per bundle.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pocketvlm.bundle import Bundle
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.device_bench.controller.prompts import render_turns
from pocketvlm.device_bench.protocol import Turn
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.text import TextCodec

_NEW_TOKENS = 32
_SECOND = Turn(text="how many squares are there?")


def compare(command: Sequence[str], folder: Path, n: int, seed: int) -> tuple[int, int]:
    """Equal answers of the first and of the second turns."""
    bundle = Bundle.open(folder)
    codec, conversation = TextCodec.from_bundle(bundle), Conversation(bundle)
    equal = [0, 0]
    with tempfile.TemporaryDirectory() as work:
        picture = Path(work) / "picture.png"
        for sample in CalibrationSet.from_reference(seed=seed, n=n, split="evaluation"):
            sample.open_image().save(picture)
            turns = (Turn(text=sample.question, pictures=(0,)), _SECOND)
            words: list[str | Path] = ["--image", picture]
            for turn in render_turns(codec, turns):
                words += ["--rendered", turn.rendered or ""]
            done = subprocess.run(
                [*command, folder, *words, "--max-new-tokens", str(_NEW_TOKENS), "--json"],
                capture_output=True,
                check=True,
            )
            conversation.reset()
            for number, (turn, line) in enumerate(
                zip(turns, done.stdout.splitlines(), strict=True)
            ):
                images = [picture] if turn.pictures else None
                expected = conversation.ask(turn.text, images, max_new_tokens=_NEW_TOKENS)
                found = json.loads(line)
                equal[number] += tuple(found["token_ids"]) == expected.token_ids
    return equal[0], equal[1]


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--runner", required=True, type=shlex.split)
    parser.add_argument("--n", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for folder in options.bundles:
        first, second = compare(options.runner, folder, options.n, options.seed)
        print(f"{folder}: {first} of {options.n} first turns, {second} of {options.n} second turns")


if __name__ == "__main__":
    main()
