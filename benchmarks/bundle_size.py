"""Bytes of real ONNX bundles at a published shape, by part, beside the bf16 source.

    python benchmarks/bundle_size.py --work shapes

Measured from the files: constants are attributed to the part that their name belongs to, and
every file of the bundle counts, the tokenizer too. Prints a table, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
from shape_bundles import write_bundle

from pocketvlm.bundle import Bundle
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.models.spec import ModelSpec

_SHAPE = "smolvlm-256m"
_BOUNDS = {"int4-balanced": 0.40, "int4-small": 0.30}


def part_of(constant: str, spec: ModelSpec) -> str:
    """The part of the model that a constant belongs to, by its name."""
    decoder = spec.decoder
    prefixes = {
        spec.tower.prefix: "tower",
        decoder.embedding: "embedding",
        decoder.head: "head",
        decoder.prefix: "decoder",
    } | dict.fromkeys(spec.projector.linears, "projector")
    return next((part for prefix, part in prefixes.items() if constant.startswith(prefix)), "other")


def bytes_by_part(bundle: Bundle, spec: ModelSpec) -> dict[str, int]:
    """Bytes of the bundle: external constants by part, the rest as `graphs` and `processor`."""
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    for component in bundle.manifest.components:
        graph = onnx.load(bundle.path / component.file, load_external_data=False).graph
        sizes["graphs"] += (bundle.path / component.file).stat().st_size
        for tensor in graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place and int(place["offset"]) not in seen:
                seen.add(int(place["offset"]))
                sizes[part_of(tensor.name, spec)] += int(place["length"])
    weights = (bundle.path / "onnx" / "weights.bin").stat().st_size
    sizes["padding"] = weights - sum(
        count for part, count in sizes.items() if part not in {"graphs", "padding"}
    )
    sizes["processor"] = bundle.stored_bytes() - weights - sizes["graphs"]
    return dict(sizes)


def main() -> None:
    """Writes both bundles and compares them with their source and their bound."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and bundles")
    options = parser.parse_args()
    result: dict[str, Any] = {"shape": _SHAPE}
    spec = None
    for name, bound in _BOUNDS.items():
        bundle = write_bundle(_SHAPE, name, options.work / name)
        if spec is None:
            checkpoint = Checkpoint.load(options.work / _SHAPE)
            spec, source = checkpoint.spec, checkpoint.source.weight_bytes
            result["source_bytes"] = source
            print(f"{_SHAPE}: bf16 source {source / 1e6:.1f} MB")
        parts = bytes_by_part(bundle, spec)
        total = bundle.stored_bytes()
        result[name] = {"bundle_bytes": total, "share": total / source, "parts_bytes": parts}
        print(f"\n{name}: {total / 1e6:.1f} MB, {total / source:.4f} of the source (≤ {bound})")
        for part, count in sorted(parts.items(), key=lambda item: -item[1]):
            print(f"  {part:10s} {count / 1e6:8.2f} MB  {count / source:.4f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
