"""Real bundles of the tiny models: exported, signed and opened as an app would find them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketvlm.bundle import Bundle, Manifest, sign_files, write_manifest
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.fixed import FixedReducer
from pocketvlm.context import RunContext
from pocketvlm.export.onnx import ToOnnx

KINDS = ("llava", "smolvlm", "llava-original", "smolvlm-consecutive")


@dataclass(frozen=True, eq=False)
class Pair:
    """A checkpoint and the bundle that was made from it."""

    checkpoint: Checkpoint
    bundle: Bundle


def write_bundle(checkpoint: Checkpoint, path: Path) -> Bundle:
    """Exports and signs, without the certificate, which needs the runtime itself."""
    components = ToOnnx().export(checkpoint, path, RunContext(threads=1))
    checkpoint.processor.save(path)
    spec, reducer = checkpoint.spec, checkpoint.reducer
    manifest = Manifest(
        model="tiny",
        family=spec.family,
        source_sha256="",
        recipe_sha256="",
        visual_tokens=reducer.keep if reducer else spec.visual_tokens,
        visual_tokens_full=spec.visual_tokens,
        positions=reducer.positions if reducer else "original",
        prompt={
            "image_token": spec.image_token,
            "image_token_id": spec.image_token_id,
            "image_prefix": spec.image_prefix,
            "image_suffix": spec.image_suffix,
        },
        generation={
            "eos_token_ids": list(checkpoint.processor.eos_token_ids),
            "max_positions": spec.decoder.max_positions,
        },
        kv_cache={
            "layers": spec.decoder.depth,
            "kv_heads": spec.decoder.kv_heads,
            "head_dim": spec.decoder.head_dim,
            "dtype": "float32",
        },
        components=components,
        files=sign_files(path, frozenset()),
    )
    write_manifest(path, manifest)
    return Bundle.open(path)


@pytest.fixture(scope="session")
def pairs(tiny_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Both families, with all of their tokens and with five of sixteen under each policy."""
    root = tmp_path_factory.mktemp("bundles")
    made = {}
    for kind in KINDS:
        family, _, policy = kind.partition("-")
        checkpoint = Checkpoint.load(tiny_paths[family])
        if policy:
            reducer = FixedReducer((1, 4, 6, 11, 14), positions=policy)
            checkpoint = replace(checkpoint, reducer=reducer)
        made[kind] = Pair(checkpoint, write_bundle(checkpoint, root / kind))
    return made


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, pairs: dict[str, Pair]) -> Pair:
    """Each kind in turn; read-only by agreement."""
    return pairs[request.param]


@pytest.fixture
def llava(pairs: dict[str, Pair]) -> Pair:
    """One kind, where the kind makes no difference."""
    return pairs["llava"]


@pytest.fixture
def picture() -> Image.Image:
    """Noise: every pixel matters."""
    return noise(0)


def noise(seed: int, size: tuple[int, int] = (50, 40)) -> Image.Image:
    """A seeded picture of independent pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values)
