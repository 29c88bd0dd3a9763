"""What the target writes: the same bytes each time, described in the manifest, loadable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.stage import REDUCERS
from pocketvlm.context import RunContext
from pocketvlm.errors import ExportError, MissingExtraError, UnsupportedError
from pocketvlm.export.coreml import toolkit as coreml_toolkit
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.files.reader import file_sha256
from pocketvlm.models.reducer import ReducerInputs, TokenReducer
from pocketvlm.reference_graph.forward import encode_images
from pocketvlm.weights.kv_cache import KVCacheScales
from tests.contracts.reducers import make_reducer
from tests.export.coreml.rig import PackageContent, export, run_vision
from tests.export.rig import make_prompt, quantize_checkpoint

coremltools = pytest.importorskip("coremltools", reason="the coreml extra is not installed")


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}


@pytest.mark.parametrize("deployment", ["iOS17", "iOS18"])
def test_the_same_bytes_each_time(tiny_path: Path, tmp_path: Path, deployment: str) -> None:
    written = []
    for attempt in ("first", "second"):
        checkpoint = Checkpoint.load(tiny_path)
        folder = export(checkpoint, tmp_path / attempt, deployment=deployment)
        written.append(digests(folder))
    assert written[0] == written[1]
    names = {name.partition("/")[0] for name in written[0]}
    expected = {"vision.mlpackage", "decoder.mlpackage"}
    assert names == expected | ({"embedding.mlpackage"} if deployment == "iOS17" else set())


def test_the_manifest_says_what_the_packages_say(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = quantize_checkpoint(tiny_checkpoint, 4)
    components = ToCoreml(context=50, chunk=8).export(checkpoint, tmp_path, RunContext())
    described = [(component.role, component.function) for component in components]
    assert described == [
        ("vision", None),
        ("embedding", "embedding"),
        ("decoder", "prefill"),
        ("decoder", "decode"),
    ]
    for component in components:
        content = PackageContent(tmp_path / component.file)
        description = content.spec.description
        if component.function is not None:
            (description,) = [f for f in description.functions if f.name == component.function]
        for signatures, features in (
            (component.inputs, description.input),
            (component.outputs, description.output),
        ):
            found = [
                (feature.name, tuple(feature.type.multiArrayType.shape)) for feature in features
            ]
            assert found == [(signature.name, signature.shape) for signature in signatures]
        states = [
            (state.name, tuple(state.type.stateType.arrayType.shape)) for state in description.state
        ]
        assert states == [(signature.name, signature.shape) for signature in component.states]
        assert set(component.precision.values()) == {"int4 g32 asymmetric"}
    decoder = checkpoint.spec.decoder
    # The cache's rows and width are multiples of 32, whatever was asked for.
    assert components[-1].states[0].shape == (decoder.depth, decoder.kv_heads, 64, 32)
    assert content.spec.description.defaultFunctionName == "decode"


@pytest.mark.parametrize("deployment", ["iOS17", "iOS18"])
def test_the_toolkit_reads_its_own_language_in_them(
    tiny_checkpoint: Checkpoint, tmp_path: Path, deployment: str
) -> None:
    """Every operator passes coremltools' type checks again, read from the file."""
    from coremltools.converters.mil.frontend.milproto.load import load

    bits = 4 if deployment == "iOS18" else 8
    checkpoint = quantize_checkpoint(tiny_checkpoint, bits, 1024)
    for package in sorted(export(checkpoint, tmp_path, deployment=deployment).iterdir()):
        model = coremltools.models.MLModel(str(package), skip_model_load=True)
        spec = model.get_spec()
        program = load(spec, spec.specificationVersion, model.weights_dir)
        assert set(program.functions) == set(spec.mlProgram.functions)
        assert all(function.operations for function in program.functions.values())


@pytest.mark.parametrize("name", REDUCERS)
def test_every_reducer_becomes_a_program(tiny_path: Path, tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint.load(tiny_path)
    try:
        reducer = make_reducer(name).build(checkpoint.spec, keep=8, positions="original")
    except UnsupportedError:
        pytest.skip("no [CLS] token")
    checkpoint = replace(checkpoint, reducer=reducer)
    pixels, _, _ = make_prompt(checkpoint)
    folder = export(checkpoint, tmp_path)
    seen = run_vision(folder / "vision.mlpackage", pixels.numpy())
    with torch.inference_mode():
        visual = encode_images(checkpoint, pixels)
    assert seen["indices"].tolist() == visual.indices.tolist()
    torch.testing.assert_close(
        torch.from_numpy(seen["embeds"]), visual.embeds, rtol=0.02, atol=0.02
    )


class Branching(TokenReducer):
    """An operator that the toolkit does not know."""

    def forward(self, inputs: ReducerInputs) -> tuple[Tensor, Tensor]:
        scores = inputs.features.sum(-1)
        indices = torch.linalg.qr(scores[None].expand(1, 4, -1))[1][0, 0, : self.keep].long()[None]
        return inputs.features[:, : self.keep], indices


def test_a_reducer_that_cannot_be_converted_is_named(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = replace(tiny_checkpoint, reducer=Branching(keep=3, positions="original"))
    with pytest.raises(ExportError, match=r"Branching: cannot become.*qr"):
        export(checkpoint, tmp_path)


def test_an_int8_cache_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    decoder = tiny_checkpoint.spec.decoder
    scales = torch.ones(decoder.depth, decoder.kv_heads, decoder.head_dim)
    checkpoint = replace(tiny_checkpoint, cache_grid=KVCacheScales(keys=scales, values=scales))
    with pytest.raises(UnsupportedError, match="coreml: keeps no KV cache of 8 bits"):
        export(checkpoint, tmp_path)


def test_a_missing_toolkit_is_named(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coreml_toolkit, "has_coremltools", lambda: False)
    with pytest.raises(MissingExtraError, match=r"pip install 'pocketvlm\[coreml\]'"):
        export(tiny_checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deployment": "iOS16"}, "allowed are iOS17, iOS18"),
        ({"precision": "bfloat16"}, "allowed are float16, float32"),
        ({"chunk": 0}, "chunk is 0"),
        ({"context": 16}, "context is 16; allowed are 32"),
    ],
)
def test_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToCoreml(**options)


def test_what_the_toolkit_says_is_collected() -> None:
    import logging
    import warnings

    with coreml_toolkit.listen() as said:
        logging.getLogger("coremltools").warning("a  remark")
        logging.getLogger("coremltools").warning("a remark")
        logging.getLogger("coremltools").info("a detail")
        warnings.warn("a warning", UserWarning, stacklevel=1)
        warnings.warn("of code", DeprecationWarning, stacklevel=1)
    assert said == ["a remark", "a warning"]
