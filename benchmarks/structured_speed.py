"""Decoding speed of the ONNX bundles of a narrower or shallower decoder, beside the whole one.

    python benchmarks/structured_speed.py --work shapes
    python benchmarks/structured_speed.py --work shapes --share 0.25 --kv-groups 2 --blocks 26

Random weights at a published shape: the speed of dense weights does not depend on their values, so
which units go does not matter, only how many. The rule of `prune_width` chooses the widths, and
`--blocks` is the number of decoder blocks that stay. Both models are exported as float32 and as
int4; all four bundles take turns in one run, and ratios are taken round by round. Prints what was
removed, with and without embedding and head, a table, and one JSON line with every raw sample.
Beside wall time stands the processor time of the same tokens, which tells the same on a busy
machine; only with one thread, since more of them also burn time while they wait for each other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shape_bundles import bundle_of

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.pruning.depth.blocks import Block, remove_blocks
from pocketvlm.compress.pruning.width.channels import Widths, remove_units, unit_groups
from pocketvlm.compress.pruning.width.widths import choose_widths
from pocketvlm.models.spec import ModelSpec
from pocketvlm.reference.random_models import write_shape
from pocketvlm.reference.shapes import load_shape
from pocketvlm.runtime.onnx.runner import OnnxRunner

_SHAPE = "smolvlm-256m"
_RECIPES = {"float32": "float", "int4": "int4-balanced"}
_BARS = {"float32": 1.2, "int4": 1.15}


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How much of the decoder goes.

    Attributes:
        share: Share of the weights of the blocks that stay, taken from their width; 0 for none.
        kv_groups: KV groups that stay; `None` leaves that to the stage's rule.
        blocks: Decoder blocks that stay; `None` for all.
    """

    share: float
    kv_groups: int | None
    blocks: int | None

    @property
    def label(self) -> str:
        """The name of the bundles' folders."""
        groups = "" if self.kv_groups is None else f"-groups{self.kv_groups}"
        blocks = "" if self.blocks is None else f"-blocks{self.blocks}"
        return f"width{self.share:g}{groups}{blocks}"

    def widths(self, spec: ModelSpec) -> Widths:
        """Widths as `prune_width` would choose them."""
        return choose_widths(
            spec,
            decoder_parameters=self.share,
            ffn_ratio=0.0,
            kv_groups=self.kv_groups,
            tower_ffn_ratio=0.0,
            multiple_of=32,
        )

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        """Removes the last blocks and the last units of the others."""
        depth = checkpoint.spec.decoder.depth
        kept = depth if self.blocks is None else self.blocks
        gone = [Block(stack="decoder", index=index) for index in range(kept, depth)]
        if gone:
            checkpoint = remove_blocks(checkpoint, gone)
        widths = self.widths(checkpoint.spec)
        units = {
            group: torch.arange(count)
            for groups, count in (
                (unit_groups(checkpoint.spec, "kv_groups"), widths.kv_groups),
                (unit_groups(checkpoint.spec, "ffn"), widths.ffn),
            )
            for group in groups
            if count < group.count
        }
        return remove_units(checkpoint, units) if units else checkpoint


def decode_round(runner: OnnxRunner, prompt: int, new: int) -> dict[str, list[float]]:
    """One prefill and `new` greedy tokens: milliseconds of each token, by both clocks."""
    ids = np.random.default_rng(0).integers(10, 40_000, prompt).tolist()
    runner.reset()
    logits = runner.decode(runner.embed(ids), np.arange(prompt, dtype=np.int64)[None])
    sample: dict[str, list[float]] = {"wall_ms": [], "processor_ms": []}
    for position in range(prompt, prompt + new):
        wall, processor = time.perf_counter(), time.process_time()
        token = int(logits.argmax())
        logits = runner.decode(runner.embed([token]), np.array([[position]], np.int64))
        sample["processor_ms"].append((time.process_time() - processor) * 1e3)
        sample["wall_ms"].append((time.perf_counter() - wall) * 1e3)
    return sample


def decoder_weights(spec: ModelSpec) -> dict[str, int]:
    """Weights of the blocks alone, of all that a token is multiplied with, and of all."""
    counts = {
        part: sum(x.out_features * x.in_features for x in spec.linears() if x.part == part)
        for part in ("decoder", "embedding", "head")
    }
    head = counts["head"] or counts["embedding"]  # a tied head is the embedding's table
    return {
        "blocks": counts["decoder"],
        "blocks and head": counts["decoder"] + head,
        "blocks, head and embedding": sum(counts.values()),
    }


def _verdict(ratio: float, bar: float) -> str:
    return "yes" if ratio >= bar else "NO"


def main() -> None:
    """Writes the bundles, lets them run in turns, prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and bundles")
    parser.add_argument(
        "--share", type=float, default=0.25, help="of the blocks' weights, by width"
    )
    parser.add_argument("--kv-groups", type=int, help="KV groups that stay")
    parser.add_argument("--blocks", type=int, help="decoder blocks that stay")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=24)
    options = parser.parse_args()
    cut = Cut(share=options.share, kv_groups=options.kv_groups, blocks=options.blocks)

    path = write_shape(load_shape(_SHAPE), options.work / _SHAPE, is_split=False)
    whole = Checkpoint.load(path)
    before = decoder_weights(whole.spec)
    narrow = cut.apply(whole)
    after = decoder_weights(narrow.spec)
    decoder = narrow.spec.decoder
    print(
        f"{_SHAPE}: {decoder.depth} blocks of {decoder.kv_heads} KV groups and {decoder.ffn_size} "
        "FFN channels"
    )
    removed = {name: 1 - after[name] / count for name, count in before.items()}
    for name, share in removed.items():
        print(f"  {share:6.1%} fewer weights in {name}")
    del whole, narrow

    runners = {
        (variant, precision): OnnxRunner(
            bundle_of(make, recipe, options.work / f"{name}-{recipe}"),
            threads=options.threads,
            capacity=512,
            keep_vision=False,
        )
        for precision, recipe in _RECIPES.items()
        for variant, name, make in (
            ("whole", _SHAPE, partial(Checkpoint.load, path)),
            ("pruned", cut.label, lambda: cut.apply(Checkpoint.load(path))),
        )
    }
    samples: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in runners}
    for index in range(options.rounds + 1):
        for key, runner in runners.items():
            sample = decode_round(runner, options.prompt, options.new)
            if index:  # the first round warms up
                samples[key].append(sample)
    report(samples, removed, options.threads)


def report(
    samples: dict[tuple[str, str], list[dict[str, Any]]], removed: dict[str, float], threads: int
) -> None:
    """Prints the table and the JSON line."""
    rounds = len(next(iter(samples.values())))
    print(f"\n{threads} threads, {rounds} rounds in turns\n")
    print("         clock      whole tok/s  pruned tok/s  ratio  by round")
    document: dict[str, Any] = {"shape": _SHAPE, "threads": threads, "removed": removed}
    for precision, bar in _BARS.items():
        for clock in ("wall", "processor"):
            speeds = {
                variant: [
                    # A median a round, so that a ratio compares what ran side by side.
                    1e3 / statistics.median(sample[f"{clock}_ms"])
                    for sample in samples[variant, precision]
                ]
                for variant in ("whole", "pruned")
            }
            ratios = [new / old for old, new in zip(speeds["whole"], speeds["pruned"], strict=True)]
            median = statistics.median(ratios)
            print(
                f"{precision:8s} {clock:9s} {statistics.median(speeds['whole']):12.1f} "
                f"{statistics.median(speeds['pruned']):13.1f} {median:6.2f}  "
                f"{min(ratios):.2f} to {max(ratios):.2f}"
                + (f"; at least {bar:g}: {_verdict(median, bar)}" if clock == "wall" else "")
            )
            document[f"{precision} {clock}"] = {"decode_tok_s": speeds, "ratios": ratios}
    document["samples"] = {
        f"{variant} {precision}": taken for (variant, precision), taken in samples.items()
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
