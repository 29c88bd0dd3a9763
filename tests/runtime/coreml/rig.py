"""Bundles of tiny models for Core ML, and the command of what stands in for Core ML."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from pocketvlm.bundle import Bundle
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.baseline.fixed import FixedReducer
from pocketvlm.context import RunContext
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.pipeline.assemble import write_graphs

CHUNK, CONTEXT = 8, 256


def reduced(path: Path, positions: str) -> Checkpoint:
    """A tiny model that keeps five of sixteen visual tokens."""
    reducer = FixedReducer((1, 4, 6, 11, 14), positions=positions)
    return replace(Checkpoint.load(path), reducer=reducer)


def write_coreml_bundle(checkpoint: Checkpoint, path: Path, **options: Any) -> Bundle:
    """Exports and signs, without a certificate."""
    target = ToCoreml(chunk=CHUNK, context=CONTEXT, **options)
    write_graphs(checkpoint, (target,), path, "", RunContext(threads=1))
    return Bundle.open(path)


def stand_in(mode: str) -> tuple[str, ...]:
    """The worker's command with the stand-in in place of Core ML; see its modes there."""
    return (sys.executable, str(Path(__file__).with_name("standin.py")), mode)
