"""Core ML as a backend of `transformers.exporters`, under the format `coreml`.

A vision-language model becomes the packages of `ToCoreml`, which hold the token merge's two sides,
the cache and shared weights. Any other graph goes through coremltools' own converter, as far as
that reaches. Importing this module registers nothing; `register` does.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.exporters import register_backend
from transformers.exporters.base import ExportedComponent, ExportedModel, HfExporter
from transformers.exporters.configs import DynamoConfig, ExportConfigMixin
from transformers.exporters.exporter_dynamo import DynamoExporter
from transformers.exporters.metadata import ExportMetadata

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import CheckpointError, ExportError
from pocketvlm.export.coreml.reducer import convert_program
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.export.coreml.toolkit import listen

__all__ = ["CoremlExportConfig", "CoremlExporter", "register"]


@dataclass
class CoremlExportConfig(ExportConfigMixin):
    """Options of the backend; see `ToCoreml`."""

    export_format: str = "coreml"
    deployment: Literal["iOS17", "iOS18"] = "iOS18"
    precision: Literal["float16", "float32"] = "float16"
    chunk: int = 32
    context: int = 2048

    # Read by the base class: weights are compressed before they come here.
    quantizer: None = None


class CoremlExporter(HfExporter):
    """Exports transformers models to Core ML packages."""

    export_format = "coreml"
    config_class = CoremlExportConfig
    program_suffix = ".mlpackage"
    required_packages = ["coremltools"]  # noqa: RUF012  (the base class declares it so)

    def export_for_generation(
        self,
        model: Any,
        sample_inputs: Mapping[str, Any],
        config: CoremlExportConfig | Mapping[str, Any],
        **options: Any,
    ) -> ExportedModel:
        """A vision-language model as packages, dense; one component a package.

        Args:
            model: A model of a supported family, loaded from a directory: its tokenizer and image
                processor are read there.
            sample_inputs: Not looked at; nothing is traced.
            config: Options, or their values by name.
            options: Refused: there is nothing to sample or to trace.

        Raises:
            CheckpointError: The model's family is not supported, or its directory is gone.
            ExportError: A package could not be written.
        """
        if options:
            raise ExportError(f"coreml: {', '.join(sorted(options))}: not an option of this format")
        if not isinstance(config, CoremlExportConfig):
            config = CoremlExportConfig(**config)
        target = ToCoreml(
            deployment=config.deployment,
            precision=config.precision,
            chunk=config.chunk,
            context=config.context,
        )
        scratch = Path(tempfile.mkdtemp())
        try:
            checkpoint = _checkpoint_of(model, scratch / "model")
            written = target.export(checkpoint, scratch, RunContext())
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        exported = ExportedModel(
            {
                Path(file).stem: ExportedComponent(
                    self.load_program(scratch / file), _metadata(model, config)
                )
                for file in dict.fromkeys(component.file for component in written)
            },
            self.export_format,
            config=model.config,
            generation_config=model.generation_config,
        )
        # Programs refer to their files until they are saved.
        weakref.finalize(exported, shutil.rmtree, scratch, ignore_errors=True)
        return exported

    def export_program(
        self, model: Any, sample_inputs: Any, config: CoremlExportConfig
    ) -> tuple[Any, ExportMetadata]:
        """One graph, traced by transformers and converted by coremltools.

        Raises:
            ExportError: An operator cannot be converted; the message names it.
        """
        program, metadata = DynamoExporter().export_program(model, sample_inputs, DynamoConfig())
        with listen(), torch.no_grad():
            converted = convert_program(
                type(model).__name__,
                program,
                config.deployment,
                precision=config.precision,
                convert_to="mlprogram",
            )
        return converted, metadata

    @classmethod
    def save_program(cls, program: Any, path: str | Path) -> None:
        """Writes a package."""
        program.save(str(path))

    @classmethod
    def load_program(cls, path: str | Path) -> Any:
        """Reads a package; it is not compiled, which only an Apple machine can."""
        import coremltools

        with listen():
            return coremltools.models.MLModel(str(path), skip_model_load=True)


def register() -> None:
    """Makes the backend known to transformers' auto classes."""
    register_backend(CoremlExporter)


def _checkpoint_of(model: Any, scratch: Path) -> Checkpoint:
    """A model in memory, written and read again as a checkpoint."""
    origin = Path(model.name_or_path)
    if not origin.is_dir():
        raise CheckpointError(
            f"{model.name_or_path or type(model).__name__}: a tokenizer and an image processor are "
            "read from the directory of the model; load it from a local one"
        )
    model.save_pretrained(scratch)
    for file in sorted([*origin.glob("*.json"), *origin.glob("*.jinja")]):
        if not (scratch / file.name).exists():
            shutil.copyfile(file, scratch / file.name)
    return Checkpoint.load(scratch)


def _metadata(model: Any, config: CoremlExportConfig) -> ExportMetadata:
    return ExportMetadata(
        architecture=type(model).__name__, export_dtype=config.precision, export_device="cpu"
    )
