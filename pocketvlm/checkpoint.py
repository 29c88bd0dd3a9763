"""Checkpoint: a model with its processor, its specification and everything that was done to it.

A checkpoint is loaded from a Hugging Face directory (safetensors only) or from one that `save`
wrote. Weight matrices stay in the type in which they are stored and are widened where they are
used, so that a bf16 model costs its file size in memory and computes in float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pocketvlm.bundle import replace_directory
from pocketvlm.cache_grid import CacheGrid
from pocketvlm.errors import CheckpointError
from pocketvlm.files import file_sha256
from pocketvlm.json_io import read_json, write_json
from pocketvlm.layouts import StoredLayout, read_stored_layout
from pocketvlm.modelspec import (
    LinearSpec,
    ModelSpec,
    canonical_weight_name,
    supported_families,
)
from pocketvlm.processor import Processor
from pocketvlm.reduction import TokenReducer
from pocketvlm.weights import (
    FORMS,
    DenseWeight,
    FormEmbedding,
    FormLinear,
    WeightForm,
)

__all__ = [
    "CHECKPOINT_SCHEMA",
    "Checkpoint",
    "ReducerBuilder",
    "Source",
    "StageRecord",
    "read_config",
    "read_spec",
]

CHECKPOINT_SCHEMA = 1
_MANIFEST = "pocketvlm.json"
_WEIGHTS = "model.safetensors"
_CACHE = "kv_cache."


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What one stage did to a checkpoint; enough to replay it and to render the report.

    Attributes:
        method: The stage's tag.
        parameters: Its configuration, as JSON values.
        version: Version of pocketvlm.
        calibration_sha256: Digest of the calibration set, or `None` where none was used.
        layers: One row a layer: name, form, bits, losses, fallbacks with reasons.
        metrics: Figures of the stage as a whole.
        notes: What a reader must know: fallbacks, skipped modules, failed bounds.
        seconds: Wall time; in the run's log and report, not in a saved checkpoint.
        peak_rss_bytes: Largest resident set of the process at the end of the stage; likewise.
    """

    method: str
    parameters: Mapping[str, Any]
    version: str
    calibration_sha256: str | None
    layers: tuple[Mapping[str, Any], ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    peak_rss_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a checkpoint came from.

    Attributes:
        name: Folder name of the original model.
        sha256: Digest over its weight files.
        weight_bytes: Bytes of its weight files.
    """

    name: str
    sha256: str
    weight_bytes: int


ReducerBuilder = Callable[[Mapping[str, Any], ModelSpec], TokenReducer]


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A model on its way to the phone.

    The model is owned by the checkpoint that was made last: a stage may change it in place and
    returns a new `Checkpoint` that holds it.

    Attributes:
        model: The stock transformers model; its weight matrices are `FormLinear` and
            `FormEmbedding` modules.
        processor: Tokenizer and image processor.
        spec: Where everything is.
        config: Content of config.json.
        source: Where the weights came from.
        reducer: The visual-token reduction, or `None` for all tokens.
        cache_grid: What the KV cache is rounded to, or `None` where it stays float32.
        visual_layers: First layers of the decoder that visual tokens run through
            (`pocketvlm.visual_depth`), or `None` for all of them.
        history: One record a stage, in order.
    """

    model: nn.Module
    processor: Processor
    spec: ModelSpec
    config: Mapping[str, Any]
    source: Source
    reducer: TokenReducer | None = None
    cache_grid: CacheGrid | None = None
    visual_layers: int | None = None
    history: tuple[StageRecord, ...] = ()

    @classmethod
    def load(
        cls, path: Path | str, *, reducers: Mapping[str, ReducerBuilder] | None = None
    ) -> Checkpoint:
        """Loads a Hugging Face directory, or one that `save` or `save_layout` wrote.

        Layers in a layout of other tools (GPTQ, VPTQ) keep their codes.

        Args:
            path: The directory.
            reducers: Builders of visual-token reducers by stage tag, for directories whose
                history holds one; `pocketvlm.load_checkpoint` passes all there are.

        Raises:
            CheckpointError: The directory is missing, damaged or holds pickled weights only.
            UnsupportedError: The model's family is not supported.
        """
        path = Path(path)
        config = read_config(path)
        spec = read_spec(config)
        manifest = read_json(path / _MANIFEST) if (path / _MANIFEST).is_file() else None
        layout = None if manifest else read_stored_layout(config)
        processor = Processor.load(path, spec)
        files = _weight_files(path)
        digests = _verify_files(files, manifest)
        model = _build_model(config)
        forms = manifest["forms"] if manifest else {}
        _load_weights(model, spec, files, forms, layout)
        # What the directory's layout was, the forms tell now; it is not how `save` will store them.
        config = {key: value for key, value in config.items() if key != "quantization_config"}
        if manifest is None:
            joined = hashlib.sha256("".join(digests).encode()).hexdigest()
            source = Source(
                name=path.resolve().name,
                sha256=joined,
                weight_bytes=sum(file.stat().st_size for file in files),
            )
            return cls(model=model, processor=processor, spec=spec, config=config, source=source)
        return cls(
            model=model,
            processor=processor,
            spec=spec,
            config=config,
            source=Source(**manifest["source"]),
            reducer=_restore_reducer(manifest, spec, reducers or {}, path),
            cache_grid=_load_cache_grid(spec, files),
            visual_layers=_read_visual_layers(manifest, spec, path),
            history=tuple(_record_from_json(record) for record in manifest["history"]),
        )

    def save(self, path: Path | str) -> None:
        """Writes the checkpoint with its history; takes the place of `path` only when whole."""
        path = Path(path)
        with replace_directory(path) as folder:
            (folder / "config.json").write_text(
                json.dumps(self.config, indent=2) + "\n", encoding="utf-8"
            )
            self.processor.save(folder)
            tensors, forms = self._stored_tensors()
            try:
                save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
            except SafetensorError as error:
                # The library hides an operating system's error, such as a full disk, in its own.
                raise CheckpointError(f"{path}: cannot be written: {error}") from error
            reducing = [r for r in self.history if self.reducer and "keep" in r.metrics]
            write_json(
                folder / _MANIFEST,
                {
                    "schema": CHECKPOINT_SCHEMA,
                    "source": asdict(self.source),
                    "files": {_WEIGHTS: file_sha256(folder / _WEIGHTS)},
                    "forms": forms,
                    "reducer": (
                        {"method": reducing[-1].method, "parameters": dict(reducing[-1].parameters)}
                        if reducing
                        else None
                    ),
                    "visual_layers": self.visual_layers,
                    "history": [_timeless(record) for record in self.history],
                },
            )

    def form(self, name: str) -> WeightForm:
        """The stored weight of a layer."""
        return self.layer(name).form

    def layer(self, name: str) -> FormLinear | FormEmbedding:
        """The module of a weight matrix by its name in `ModelSpec.linears`."""
        module = self.model.get_submodule(name)
        if not isinstance(module, FormLinear | FormEmbedding):
            raise TypeError(f"{name} is a {type(module).__name__}, not a weight matrix")
        return module

    def set_form(self, name: str, form: WeightForm) -> None:
        """Replaces the stored weight of a layer, in place; a tied head follows its embedding."""
        layer = self.layer(name)
        if form.shape != layer.form.shape:
            raise ValueError(f"{name}: a weight {form.shape} cannot replace {layer.form.shape}")
        layer.form = form
        decoder = self.spec.decoder
        if decoder.tied_head and name == decoder.embedding:
            self.layer(decoder.head).form = form

    def forms(self) -> dict[LinearSpec, WeightForm]:
        """Every weight matrix with its stored form, in order of execution."""
        return {linear: self.form(linear.name) for linear in self.spec.linears()}

    def vectors(self) -> dict[str, Tensor]:
        """Everything that is no weight matrix: biases, norms, position tables, by name."""
        return {name: value.detach() for name, value in self.model.named_parameters()}

    def rebuild(
        self,
        config: Mapping[str, Any],
        forms: Mapping[str, WeightForm],
        vectors: Mapping[str, Tensor],
    ) -> Checkpoint:
        """The checkpoint with other shapes: a new stock model for a changed config.json.

        Args:
            config: The changed content of config.json.
            forms: Weight of every linear and of the embedding, by the new model's names, blocks
                of the tower that are never run included; a tied head follows its embedding.
            vectors: Everything else, as `vectors` names it.

        Raises:
            CheckpointError: The config cannot be understood, a shape does not fit it, or layers
                would be counted anew where visual tokens end behind one of them.
            UnsupportedError: The config asks for something that the family does not support.
            KeyError: A weight or a vector is missing.
        """
        spec = read_spec(config)
        if self.visual_layers is not None and spec.decoder.depth != self.spec.decoder.depth:
            raise CheckpointError(
                f"visual tokens end behind {self.visual_layers} of {self.spec.decoder.depth} "
                f"decoder layers, and {spec.decoder.depth} would be left; remove layers before "
                "skip_visual"
            )
        model = _build_model(config)
        decoder = spec.decoder
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                is_tied = decoder.tied_head and name == decoder.head
                form = forms[decoder.embedding if is_tied else name]
                _check_shape(name, form.shape, (module.out_features, module.in_features))
                bias = vectors[name + ".bias"] if module.bias is not None else None
                model.set_submodule(name, FormLinear(form, bias))
            elif name == decoder.embedding:
                form = forms[name]
                _check_shape(name, form.shape, (decoder.vocab_size, decoder.hidden_size))
                model.set_submodule(name, FormEmbedding(form))
        for name, parameter in list(model.named_parameters()):
            _check_shape(name, tuple(vectors[name].shape), tuple(parameter.shape))
            owner = model.get_submodule(name.rpartition(".")[0])
            value = nn.Parameter(vectors[name].to(torch.float32), requires_grad=False)
            setattr(owner, name.rpartition(".")[2], value)
        return replace(self, model=model, spec=spec, config=dict(config))

    def extend(self, record: StageRecord, **changes: Any) -> Checkpoint:
        """The checkpoint after a stage: one record more, and whatever else changed."""
        return replace(self, history=(*self.history, record), **changes)

    def _stored_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        forms: dict[str, Any] = {}
        # A codebook that several layers share is one tensor: stored with the first of them.
        owners: dict[int, str] = {}
        tied = self.spec.decoder.head if self.spec.decoder.tied_head else None
        for name, module in self.model.named_modules():
            if isinstance(module, FormLinear | FormEmbedding) and name != tied:
                shared: dict[str, str] = {}
                for key, value in module.form.to_tensors().items():
                    owner = owners.setdefault(value.data_ptr(), f"{name}.{key}")
                    if owner == f"{name}.{key}":
                        tensors[owner] = value
                    else:
                        shared[key] = owner
                if not isinstance(module.form, DenseWeight):
                    forms[name] = module.form.to_metadata()
                    if shared:
                        forms[name]["shared"] = shared
        for name, parameter in self.model.named_parameters():
            tensors[name] = parameter.detach()
        if self.cache_grid is not None:
            tensors |= {_CACHE + key: value for key, value in self.cache_grid.to_tensors().items()}
        return {name: tensors[name].contiguous() for name in sorted(tensors)}, forms


def _timeless(record: StageRecord) -> dict[str, Any]:
    """A record without what the clock said: the same work ends in the same bytes."""
    document = asdict(record)
    for key in ("seconds", "peak_rss_bytes"):
        del document[key]
    document["layers"] = [
        {key: value for key, value in layer.items() if key != "seconds"}
        for layer in document["layers"]
    ]
    return document


def read_config(path: Path) -> dict[str, Any]:
    """Content of a checkpoint directory's config.json.

    Raises:
        CheckpointError: It is missing, no JSON object, or asks for code of its own.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: is no directory; a model is a local directory")
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: no checkpoint here: config.json is missing")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(config).__name__}, not an object")
    if "auto_map" in config:
        raise CheckpointError(
            f"{file}: needs code of its own (auto_map), which is never run; "
            "convert the model to a stock transformers class first"
        )
    return config


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The specification behind a config.json, which leaves out what its class has as default.

    Raises:
        UnsupportedError: The family, or an option of it, is not supported.
        CheckpointError: A value has a type that the family's class does not take.
    """
    if config.get("model_type") not in supported_families():
        return ModelSpec.from_config(config)  # refuses, and names what is supported
    return ModelSpec.from_config(_parse_config(config).to_dict())


def _parse_config(config: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    known = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        return AutoConfig.for_model(**known)
    except Exception as error:  # its validators raise classes of their own, which vary by version
        first_line = " ".join(str(error).split())
        raise CheckpointError(f"config.json: cannot be understood: {first_line}") from error


def _weight_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors"))
    if files:
        index = path / "model.safetensors.index.json"
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            missing = sorted(name for name in names if not (path / name).is_file())
            if missing:
                raise CheckpointError(f"{path}: {missing[0]} is in the index, but missing")
        return files
    pickled = sorted((*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")))
    if pickled:
        raise CheckpointError(
            f"{pickled[0]}: pickled weights can run code and are never loaded; save the model "
            "again with model.save_pretrained(..., safe_serialization=True)"
        )
    raise CheckpointError(f"{path}: no *.safetensors here")


def _verify_files(files: Iterable[Path], manifest: Mapping[str, Any] | None) -> list[str]:
    """Digests of weight files, compared with what is known of them.

    A manifest of ours knows the digest; in a hub cache the name of the file behind the link is
    the digest. A foreign file without either cannot be told from a changed one.
    """
    digests = []
    for file in files:
        found = file_sha256(file)
        known = manifest["files"].get(file.name) if manifest else None
        target = file.resolve().name
        if known is None and file.is_symlink() and len(target) == len(found):
            known = target
        if known is not None and known != found:
            raise CheckpointError(
                f"{file}: is damaged: sha256 {found[:12]}…, expected {known[:12]}…"
            )
        digests.append(found)
    return digests


class _MatricesOnMeta(TorchFunctionMode):
    """Gives memory to vectors and buffers, none to matrices, which are loaded one by one."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            shape = args[0] if args and isinstance(args[0], tuple | list) else args
            if len(shape) > 1:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _build_model(config: Mapping[str, Any]) -> nn.Module:
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    parsed = _parse_config(config)
    with _MatricesOnMeta(), no_init_weights():
        model: nn.Module = AutoModelForImageTextToText.from_config(parsed, dtype=torch.float32)
    model.requires_grad_(requires_grad=False)
    return model.eval()


def _load_weights(
    model: nn.Module,
    spec: ModelSpec,
    files: Sequence[Path],
    forms: Mapping[str, Any],
    layout: StoredLayout | None,
) -> None:
    stored = _index_tensors(files, spec)
    taken: set[str] = set()

    def take(name: str) -> Tensor:
        if name not in stored:
            raise CheckpointError(f"{files[0].parent}: tensor {name} is missing from the weights")
        taken.add(name)
        file, key = stored[name]
        return _read_tensor(file, key)

    owned_by_several = {
        owner for metadata in forms.values() for owner in metadata.get("shared", {}).values()
    }
    kept: dict[str, Tensor] = {}

    def take_shared(name: str) -> Tensor:
        if name not in owned_by_several:
            return take(name)
        if name not in kept:
            kept[name] = take(name)
        return kept[name]

    def take_form(name: str) -> WeightForm:
        metadata = forms.get(name, {"kind": DenseWeight.kind})
        form_type = next((form for form in FORMS if form.kind == metadata["kind"]), None)
        if form_type is None:
            raise CheckpointError(
                f"{files[0].parent}: {name} has a weight of kind {metadata['kind']!r}; known are "
                f"{', '.join(form.kind for form in FORMS)}"
            )
        shared_tensors = metadata.get("shared", {})
        prefix = name + "."
        keys = [
            key.removeprefix(prefix)
            for key in stored
            if key.startswith(prefix) and key != prefix + "bias"
        ]
        if not keys:
            raise CheckpointError(
                f"{files[0].parent}: tensor {name}.weight is missing from the weights"
            )
        own = {key: take_shared(prefix + key) for key in keys}
        if layout is not None and layout.holds(keys):
            return layout.read(name, own)
        others = {key: take_shared(owner) for key, owner in shared_tensors.items()}
        return form_type.from_tensors(own | others, metadata)

    shared: dict[str, WeightForm] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            is_tied = spec.decoder.tied_head and name == spec.decoder.head
            source = spec.decoder.embedding if is_tied else name
            form = shared[source] if is_tied else take_form(source)
            _check_shape(name, form.shape, (module.out_features, module.in_features))
            bias = take(name + ".bias") if module.bias is not None else None
            model.set_submodule(name, FormLinear(form, bias))
        elif name == spec.decoder.embedding:
            form = shared[name] = take_form(name)
            expected = (spec.decoder.vocab_size, spec.decoder.hidden_size)
            _check_shape(name, form.shape, expected)
            model.set_submodule(name, FormEmbedding(form))
    for name, parameter in list(model.named_parameters()):
        if name in taken:
            continue
        value = take(name).to(torch.float32)
        _check_shape(name, tuple(value.shape), tuple(parameter.shape))
        owner = model.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(value, requires_grad=False))
    tied_copy = spec.decoder.head + ".weight" if spec.decoder.tied_head else None
    scales = {name for name in stored if name.startswith(_CACHE)}
    unknown = sorted(stored.keys() - taken - scales - {tied_copy})
    if unknown:
        raise CheckpointError(
            f"{files[0].parent}: tensor {unknown[0]} ({len(unknown)} in all) has no place in a "
            f"{spec.model_type} model"
        )


def _load_cache_grid(spec: ModelSpec, files: Sequence[Path]) -> CacheGrid | None:
    stored = _index_tensors(files, spec)
    tensors = {
        name.removeprefix(_CACHE): _read_tensor(*stored[name])
        for name in stored
        if name.startswith(_CACHE)
    }
    if not tensors:
        return None
    decoder = spec.decoder
    for name, scales in tensors.items():
        expected = (decoder.depth, decoder.kv_heads, decoder.head_dim)
        _check_shape(_CACHE + name, tuple(scales.shape), expected)
    return CacheGrid.from_tensors(tensors)


def _index_tensors(files: Sequence[Path], spec: ModelSpec) -> dict[str, tuple[Path, str]]:
    index: dict[str, tuple[Path, str]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                keys = list(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: is truncated or damaged: {error}") from error
        for key in keys:
            name = canonical_weight_name(spec.family, key)
            if name is not None:
                index[name] = (file, key)
    return index


def _read_tensor(file: Path, key: str) -> Tensor:
    # Opened anew for each tensor: a mapping that lives on would keep every page it touched.
    try:
        with safe_open(file, framework="pt") as tensors:
            value: Tensor = tensors.get_tensor(key).clone()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: tensor {key} cannot be read: {error}") from error
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise CheckpointError(f"{file}: tensor {key} holds values that are not finite")
    return value


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise CheckpointError(f"tensor {name} is {found}, config.json says {expected}")


def _restore_reducer(
    manifest: Mapping[str, Any],
    spec: ModelSpec,
    reducers: Mapping[str, ReducerBuilder],
    path: Path,
) -> TokenReducer | None:
    stored = manifest.get("reducer")
    if stored is None:
        return None
    if stored["method"] not in reducers:
        raise CheckpointError(
            f"{path}: reduces visual tokens by {stored['method']!r}, which is not known here; "
            "load it with pocketvlm.load_checkpoint"
        )
    return reducers[stored["method"]](stored["parameters"], spec)


def _read_visual_layers(manifest: Mapping[str, Any], spec: ModelSpec, path: Path) -> int | None:
    stored = manifest.get("visual_layers")
    if stored is None:
        return None
    if not isinstance(stored, int) or not 0 < stored < spec.decoder.depth:
        raise CheckpointError(
            f"{path / _MANIFEST}: visual_layers is {stored!r}; allowed are 1 to "
            f"{spec.decoder.depth - 1}, or null"
        )
    return stored


def _record_from_json(record: Mapping[str, Any]) -> StageRecord:
    return StageRecord(
        **{**record, "layers": tuple(record["layers"]), "notes": tuple(record["notes"])}
    )
