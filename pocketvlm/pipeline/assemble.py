"""Assembles a bundle: graphs, processor files, manifest, certificate, in this order."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocketvlm.bundle import (
    Bundle,
    CacheLayout,
    Component,
    Generation,
    Manifest,
    PromptLayout,
    sign_bundle,
    write_manifest,
)
from pocketvlm.calibration.source import Sample
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.device_bench.prediction.work import write_work
from pocketvlm.errors import PocketVLMError, StorageError
from pocketvlm.export.parity.certify import ParityReport, certify
from pocketvlm.files.full_disk import naming_faults
from pocketvlm.files.publish import replace_directory
from pocketvlm.files.reader import file_sha256
from pocketvlm.json_io import read_json, write_json
from pocketvlm.machine import toolchain_versions
from pocketvlm.models.spec import ModelSpec
from pocketvlm.pipeline.predict import predict_work
from pocketvlm.processor import Processor
from pocketvlm.recipes.load import Recipe
from pocketvlm.runtime.engines import spilling_engines
from pocketvlm.stages import PlanState, Target

__all__ = [
    "PARITY_FILE",
    "BuiltBundle",
    "add_to_parity",
    "build_bundle",
    "write_graphs",
    "write_processor",
]

PARITY_FILE = "parity.json"
_LINE_BREAK = "line_break.f32"


@dataclass(frozen=True, kw_only=True)
class BuiltBundle:
    """A bundle with its certificate.

    Attributes:
        bundle: The bundle.
        parity: Its certificate.
        failed: Why a target is missing, by target.
    """

    bundle: Bundle
    parity: ParityReport
    failed: Mapping[str, str]


def build_bundle(
    checkpoint: Checkpoint,
    recipe: Recipe,
    targets: Sequence[Target],
    path: Path,
    samples: Sequence[Sample],
    ctx: RunContext,
) -> BuiltBundle:
    """Exports every target and certifies it; replaces `path` only if something was exported.

    A bundle whose certificate fails is still written, with its verdict, so that the failure can be
    examined. So is one without a target that could not be exported: the others are complete without
    it.

    Args:
        checkpoint: The checkpoint that was evaluated.
        recipe: The recipe that made it.
        targets: The targets to export.
        path: The bundle's folder.
        samples: Questions with pictures for the certificate.
        ctx: The run.

    Raises:
        PocketVLMError: No target could be exported; the error is that of the first.
    """
    with replace_directory(path) as folder:
        components, failed = _export_each(checkpoint, targets, folder, ctx)
        if not components:
            raise next(iter(failed.values()))
        manifest = _write_rest(checkpoint, targets, components, folder, recipe.sha256())
        report = certify(
            checkpoint,
            Bundle(path=folder, manifest=manifest),
            samples,
            engines=spilling_engines(path.parent),
            ctx=ctx,
        )
        write_json(folder / PARITY_FILE, report.to_json())
        manifest = sign_bundle(folder, manifest)
    return BuiltBundle(
        bundle=Bundle(path=path, manifest=manifest),
        parity=report,
        failed={name: str(error) for name, error in failed.items()},
    )


def write_graphs(
    checkpoint: Checkpoint,
    targets: Sequence[Target],
    folder: Path,
    recipe_sha256: str,
    ctx: RunContext,
) -> Manifest:
    """Writes a bundle without a certificate into a folder: graphs, processor files, manifest."""
    components = tuple(
        component for target in targets for component in target.export(checkpoint, folder, ctx)
    )
    return _write_rest(checkpoint, targets, components, folder, recipe_sha256)


def _export_each(
    checkpoint: Checkpoint, targets: Sequence[Target], folder: Path, ctx: RunContext
) -> tuple[tuple[Component, ...], dict[str, PocketVLMError]]:
    """Exports every target that can be; a failed one leaves nothing in the folder."""
    components: list[Component] = []
    failed: dict[str, PocketVLMError] = {}
    for target in targets:
        try:
            # A full disk is not the target's fault: the others would be exported without it.
            with naming_faults(folder):
                components += target.export(checkpoint, folder, ctx)
        except StorageError:
            raise
        except PocketVLMError as error:
            failed[target.method] = error
            shutil.rmtree(folder / target.method, ignore_errors=True)
    return tuple(components), failed


def add_to_parity(bundle: Bundle, added: Mapping[str, Any]) -> None:
    """Replaces a bundle with one whose parity.json holds more; other keys of it stay."""
    with replace_directory(bundle.path) as folder:
        shutil.copytree(bundle.path, folder, copy_function=os.link, dirs_exist_ok=True)
        parity = folder / PARITY_FILE
        document = read_json(parity) if parity.is_file() else {}
        write_json(parity, {**document, **added})
        files = {**bundle.manifest.files, PARITY_FILE: file_sha256(parity)}
        write_manifest(folder, replace(bundle.manifest, files=files))


def write_processor(processor: Processor, spec: ModelSpec, folder: Path) -> Manifest:
    """Writes the processor files of a bundle, and describes the unreduced model.

    Args:
        processor: The checkpoint's processor.
        spec: The exported model's specification, which pruning changes; the processor's is the
            source's.
        folder: The bundle's folder.

    Returns:
        A manifest without graphs, names and digests.
    """
    processor.save_for_runtime(folder)
    if not (folder / "generation_config.json").is_file():
        (folder / "generation_config.json").write_text(
            json.dumps(
                {
                    "eos_token_id": list(processor.eos_token_ids),
                    **processor.generation.to_json(),
                }
            )
            + "\n",
            encoding="utf-8",
        )
    return Manifest(
        model="",
        family=spec.family,
        source_sha256="",
        recipe_sha256="",
        visual_tokens=spec.visual_tokens,
        visual_tokens_full=spec.visual_tokens,
        positions="original",
        prompt=PromptLayout(
            image_token=spec.image_token,
            image_token_id=spec.image_token_id,
            image_prefix=spec.image_prefix,
            image_suffix=spec.image_suffix,
            tile_marker=spec.tile_marker if spec.tiling is not None else None,
            whole_marker=spec.whole_marker if spec.tiling is not None else None,
            image_mark=spec.image_mark,
            is_prefix=spec.has_prefix_prompt,
            embedding_rows=spec.decoder.vocab_size,
        ),
        generation=Generation(
            eos_token_ids=processor.eos_token_ids,
            settings=processor.generation.to_json(),
            max_positions=spec.decoder.context_length,
        ),
        kv_cache=CacheLayout(
            layers=len(spec.decoder.attention_blocks),
            kv_heads=spec.decoder.kv_heads,
            head_dim=spec.decoder.head_dim,
            mutual_rows=spec.decoder.mutual_rows,
            dtype="float32",
        ),
        position_grid=spec.position_grid,
        components=(),
        toolchain=toolchain_versions(),
    )


def _write_rest(
    checkpoint: Checkpoint,
    targets: Sequence[Target],
    components: tuple[Component, ...],
    folder: Path,
    recipe_sha256: str,
) -> Manifest:
    manifest = write_processor(checkpoint.processor, checkpoint.spec, folder)
    if checkpoint.reducer is not None:
        manifest = replace(
            manifest,
            visual_tokens=checkpoint.visual_tokens,
            positions=checkpoint.reducer.positions,
        )
    if checkpoint.spec.line_break is not None:
        row = checkpoint.model.get_parameter(checkpoint.spec.line_break).detach().numpy()
        (folder / _LINE_BREAK).write_bytes(row.astype("<f4").tobytes())
        manifest = replace(manifest, prompt=replace(manifest.prompt, line_break=_LINE_BREAK))
    cache = replace(
        manifest.kv_cache,
        dtype="float32" if checkpoint.cache_grid is None else "int8",
        visual_schedule=checkpoint.visual_schedule,
    )
    written = {
        target: [each for each in components if each.target == target.method] for target in targets
    }
    exported = [target for target, own in written.items() if own]
    write_work(predict_work(PlanState.of_checkpoint(checkpoint), exported), folder)
    manifest = replace(
        manifest,
        model=checkpoint.source.name,
        source_sha256=checkpoint.source.sha256,
        recipe_sha256=recipe_sha256,
        kv_cache=cache,
        variants=(
            tuple(seen.vision_variant for seen in checkpoint.each_vision())
            if checkpoint.other_vision
            else ()
        ),
        tile_budget=checkpoint.tile_budget,
        components=components,
        runtimes={
            target.method: target.runtime_needs(folder, own)
            for target, own in written.items()
            if own
        },
    )
    return sign_bundle(folder, manifest)
