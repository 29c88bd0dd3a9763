"""The Swift file says what the packages say, and the documentation shows the file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from pocketvlm.bundle import Bundle, TensorSignature
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.baseline.fixed import FixedReducer
from pocketvlm.context import RunContext
from pocketvlm.emulation.mil.package import MilPackage
from pocketvlm.errors import BundleError
from pocketvlm.export.coreml.swift import render_swift
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.reference import reference_model_path
from tests.runtime.coreml.rig import CHUNK, CONTEXT, reduced, write_coreml_bundle

PAGE = Path(__file__).parents[3] / "docs" / "targets" / "coreml_verify.md"


@pytest.fixture(scope="module")
def bundles(
    tiny_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("swift")
    return {
        deployment: write_coreml_bundle(
            reduced(tiny_paths[family], positions), root / deployment, deployment=deployment
        )
        for deployment, family, positions in (
            ("iOS18", "llava", "original"),
            ("iOS17", "smolvlm", "consecutive"),
        )
    }


@pytest.mark.parametrize("deployment", ["iOS18", "iOS17"])
def test_names_and_shapes_are_those_of_the_packages(
    deployment: str, bundles: dict[str, Bundle]
) -> None:
    bundle = bundles[deployment]
    text = render_swift(bundle)
    assert "$" not in re.sub(r"\$[01]", "", text)  # only Swift's own
    constants = dict(re.findall(r"static let (\w+)(?:: [^=]+)? = (.+)", text))
    assert int(constants["chunk"]) == int(constants["embedChunk"]) == CHUNK
    assert int(constants["capacity"]) == CONTEXT
    assert int(constants["visualTokens"]) == 5
    assert int(constants["placeholders"]) == bundle.manifest.visual_tokens_full
    assert constants["ends"] == str(list(bundle.manifest.generation.eos_token_ids))
    loads = re.findall(r'(\w+) = try await load\("([^"]+)", (?:nil|"(\w+)")\)', text)
    assert [name for name, _, _ in loads] == ["vision", "embedding", "prefill", "step"]
    for name, file, function in loads:
        package = MilPackage.open(bundle.path / file)
        entry = package.function(function or "main")
        assert entry.name == (function or "main")
        named = {
            "vision": {"pixel_values"},
            "embedding": {"input_ids"},
        }.get(name, {"embeds", "position_ids", "past_length"})
        inputs = {p.name: p for p in entry.inputs}
        assert named <= inputs.keys()
        for value in (*named, *(set(entry.outputs) & {"embeds", "indices", "logits"})):
            assert f'"{value}"' in text
        if name == "prefill":
            assert inputs["embeds"].type.sizes == (1, CHUNK, int(constants["width"]))
            for cache in ("key_cache", "value_cache"):
                assert inputs[cache].is_state == ("MLState" in text)
                assert inputs[cache].type.sizes[-2] == CONTEXT
                if not inputs[cache].is_state:
                    assert f'"{cache}"' in text
                    assert str(list(inputs[cache].type.sizes)) in text
                    assert f"{cache}_out" in entry.outputs
    assert ("functionName" in text) == (deployment == "iOS18")
    assert text.count("{") == text.count("}")
    assert text.count("(") == text.count(")")


def test_positions_follow_the_policy(bundles: dict[str, Bundle]) -> None:
    original, consecutive = (render_swift(bundles[d]) for d in ("iOS18", "iOS17"))
    assert "Int32(start) + kept[row]" in original
    assert "let shift: Int32 = 0" in original
    assert "Int32(start) + Int32(row)" in consecutive
    assert "Self.placeholders - Self.visualTokens" in consecutive


def test_a_bundle_without_fixed_packages_has_no_file(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["iOS18"]
    others = replace(bundle, manifest=replace(bundle.manifest, components=()))
    with pytest.raises(BundleError, match="no vision graph for target 'coreml'"):
        render_swift(others)
    loose = tuple(
        replace(c, inputs=(TensorSignature(name="embeds", dtype="float32", shape=(1, "n", 8)),))
        if c.role == "decoder"
        else c
        for c in bundle.manifest.components
    )
    others = replace(bundle, manifest=replace(bundle.manifest, components=loose))
    with pytest.raises(BundleError, match="no 'embeds' of fixed shape"):
        render_swift(others)


def test_no_name_becomes_swift_code(bundles: dict[str, Bundle]) -> None:
    """Names of a stranger's manifest stay in their comment and in their literals."""
    bundle = bundles["iOS17"]
    hostile = 'x"\n}\nfatalError()\r\\(exit(1)) $ends \u202e\x1b\u2028\\'
    components = tuple(
        replace(
            c,
            file=hostile,
            function=hostile,
            inputs=tuple(
                replace(i, name=hostile) if i.name == c.inputs[-1].name else i for i in c.inputs
            ),
        )
        if c.role == "decoder"
        else c
        for c in bundle.manifest.components
    )
    manifest = replace(bundle.manifest, model=hostile, components=components)
    lines = render_swift(replace(bundle, manifest=manifest)).split("\n")
    before = render_swift(bundle).split("\n")
    assert len(lines) == len(before)
    changed = [(a, b) for a, b in zip(before, lines, strict=True) if a != b]
    assert len(changed) >= 3
    for _, line in changed:
        code = re.sub(r'"(?:[^"\\]|\\u\{[0-9a-f]+\})*"', '""', line)
        code = re.sub(r"//.*", "", code)
        assert "fatalError" not in code
        assert "exit" not in code
        assert "\\" not in code
        assert line.isprintable()


def test_the_page_shows_the_file_of_the_demo(tmp_path: Path) -> None:
    """What int4-balanced makes of pocket-llava, as far as the file depends on it."""
    checkpoint = replace(
        Checkpoint.load(reference_model_path("pocket-llava")),
        reducer=FixedReducer(tuple(range(32)), positions="original"),
    )
    write_graphs(checkpoint, (ToCoreml(),), tmp_path, "", RunContext(threads=1))
    (shown,) = re.findall(r"^```swift\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert shown == render_swift(Bundle.open(tmp_path))
