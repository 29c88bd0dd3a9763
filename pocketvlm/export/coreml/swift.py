"""A Swift file that answers from a bundle's Core ML packages, rendered from its manifest.

Names, shapes, the chunk and the cache come from the manifest and from nowhere else, so that the
file cannot drift from the packages beside it. What a turn is (where visual rows go, how the last
chunk is filled) is the same as in `runtime.coreml_runner`, which runs the same packages here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from string import Template

from pocketvlm.bundle import Bundle, TensorSignature
from pocketvlm.errors import BundleError
from pocketvlm.printable import printable_line

__all__ = ["render_swift"]

_TARGET = "coreml"
_ROWS = ("embeds", "position_ids", "past_length", "length")


def render_swift(bundle: Bundle) -> str:
    """The Swift file of a bundle.

    Raises:
        BundleError: The bundle has no Core ML packages, or one whose shapes are not fixed, or its
            pictures are cut into tiles or have positions along three axes.
    """
    manifest = bundle.manifest
    if manifest.prompt.tile_marker is not None or manifest.prompt.line_break is not None:
        raise BundleError(
            f"{bundle.path}: the Swift file answers about pictures of one tile, and this model's "
            "are cut into several; docs/runtime.md says how"
        )
    if manifest.position_grid is not None:
        raise BundleError(
            f"{bundle.path}: the Swift file counts positions along one axis, and this model's have "
            "three; docs/runtime.md says how"
        )
    if manifest.kv_cache.mutual_rows is not None:
        raise BundleError(
            f"{bundle.path}: the Swift file runs rows that see the past alone, and some of this "
            "model's see later ones; docs/runtime.md says how"
        )
    vision, embedding, _ = (
        bundle.component(_TARGET, role) for role in ("vision", "embedding", "decoder")
    )
    decoders = sorted(
        (c for c in manifest.components if (c.target, c.role) == (_TARGET, "decoder")),
        key=lambda component: _shape(component.inputs, "embeds")[1],
    )
    step, prefill = decoders[0], decoders[-1]
    if any(signature.name == "conv_state" for signature in prefill.inputs):
        raise BundleError(
            f"{bundle.path}: the Swift file keeps keys and values, and this decoder has states of "
            "short convolutions as well; docs/runtime.md says how"
        )
    passed = tuple(signature for signature in prefill.inputs if signature.name not in _ROWS)
    caches = passed or prefill.states
    _, chunk, width = _shape(prefill.inputs, "embeds")
    keeps_positions = manifest.positions == "original"
    values: dict[str, object] = {
        "model": printable_line(manifest.model),
        "pixels": list(_shape(vision.inputs, "pixel_values")),
        "visual_tokens": manifest.visual_tokens,
        "placeholders": manifest.visual_tokens_full,
        "placeholder": manifest.prompt.image_token_id,
        "ends": list(manifest.generation.eos_token_ids),
        "embed_chunk": _shape(embedding.inputs, "input_ids")[1],
        "chunk": chunk,
        "width": width,
        "capacity": _shape(caches, caches[0].name)[-2],
        "offset": "kept[row]" if keeps_positions else "Int32(row)",
        "shift": "0" if keeps_positions else "Int32(Self.placeholders - Self.visualTokens)",
        "cache_names": _text_list(signature.name for signature in caches),
        "cache_shape": list(_shape(caches, caches[0].name)),
        "step_rows": _shape(step.inputs, "embeds")[1],
    }
    for name, component in (
        ("vision", vision),
        ("embedding", embedding),
        ("prefill", prefill),
        ("step", step),
    ):
        values[f"{name}_file"] = _text(component.file)
        values[f"{name}_function"] = (
            "nil" if component.function is None else _text(component.function)
        )
    fragments = _PASSED if passed else _KEPT
    values |= {name: Template(text).substitute(values) for name, text in fragments.items()}
    return Template(_FILE).substitute(values)


def _text(value: str) -> str:
    """A string literal: escapes of JSON are not those of Swift, and a backslash fills values in."""
    signs = (
        sign
        if sign.isascii() and sign.isprintable() and sign not in '"\\'
        else f"\\u{{{ord(sign):x}}}"
        for sign in value.encode("utf-8", "replace").decode()
    )
    return f'"{"".join(signs)}"'


def _text_list(values: Iterable[str]) -> str:
    return f"[{', '.join(map(_text, values))}]"


def _shape(signatures: Iterable[TensorSignature], name: str) -> tuple[int, ...]:
    for signature in signatures:
        if signature.name == name:
            sizes = tuple(size for size in signature.shape if isinstance(size, int))
            if len(sizes) == len(signature.shape):
                return sizes
    raise BundleError(f"the Core ML packages have no {name!r} of fixed shape: no Swift file")


_KEPT: Mapping[str, str] = {
    "system": "iOS 18 or macOS 15",
    "name_function": "            configuration.functionName = function\n",
    "cache_type": "MLState",
    "new_cache": "prefill.makeState()",
    "bind_cache": "",
    "predict": (
        "            let output = try await model.prediction(\n"
        "                from: MLDictionaryFeatureProvider(dictionary: inputs), using: cache)\n"
    ),
    "fits": "past + Self.chunk <= Self.capacity",
    "empty_cache": "",
}
"""iOS 18: the runtime keeps the cache, and functions share it."""

_PASSED: Mapping[str, str] = {
    "system": "iOS 17 or macOS 14",
    "name_function": "",
    "cache_type": "[String: MLFeatureValue]",
    "new_cache": "try Self.emptyCache()",
    "bind_cache": "            inputs.merge(cache) { _, new in new }\n",
    "predict": (
        "            let output = try await model.prediction(\n"
        "                from: MLDictionaryFeatureProvider(dictionary: inputs))\n"
        "            for name in cache.keys {\n"
        '                cache[name] = output.featureValue(for: name + "_out")!\n'
        "            }\n"
    ),
    "fits": "true",
    "empty_cache": """
    private static func emptyCache() throws -> [String: MLFeatureValue] {
        var cache: [String: MLFeatureValue] = [:]
        for name in $cache_names {
            let array = MLMultiArray(MLShapedArray<Float16>(repeating: 0, shape: $cache_shape))
            cache[name] = MLFeatureValue(multiArray: array)
        }
        return cache
    }
""",
}
"""iOS 17: the cache goes in and out of every call."""

_FILE = """\
// Answers from the Core ML packages of $model.
// Rendered from the bundle's manifest by `pocketvlm inspect BUNDLE --swift`: do not edit.
import CoreML

/// A picture and the tokens of a question in, the tokens of an answer out. Needs $system.
final class PocketVLM {
    /// Pixels as preprocessor_config.json says.
    static let pixelShape = $pixels
    /// Rows that a picture becomes.
    static let visualTokens = $visual_tokens
    /// Tokens in a row that stand for a picture in a prompt.
    static let placeholders = $placeholders
    static let placeholder: Int32 = $placeholder
    static let ends: Set<Int32> = $ends
    static let embedChunk = $embed_chunk
    static let chunk = $chunk
    static let width = $width
    static let capacity = $capacity

    enum Failure: Error { case promptWithoutPicture, cacheIsFull }

    private let vision, embedding, prefill, step: MLModel
    private var cache: $cache_type
    private var past = 0

    init(bundle: URL, units: MLComputeUnits = .all) async throws {
        var compiled: [String: URL] = [:]
        func load(_ file: String, _ function: String?) async throws -> MLModel {
            if compiled[file] == nil {
                compiled[file] = try await MLModel.compileModel(at: bundle.appending(path: file))
            }
            let configuration = MLModelConfiguration()
            configuration.computeUnits = units
$name_function            return try await MLModel.load(
                contentsOf: compiled[file]!, configuration: configuration)
        }
        vision = try await load($vision_file, $vision_function)
        embedding = try await load($embedding_file, $embedding_function)
        prefill = try await load($prefill_file, $prefill_function)
        step = try await load($step_file, $step_function)
        cache = $new_cache
    }

    /// The most likely answer. `prompt` has `placeholders` placeholders where the picture goes.
    func answer(prompt: [Int32], pixels: [Float], limit: Int = 64) async throws -> [Int32] {
        let picture = MLShapedArray<Float>(scalars: pixels, shape: Self.pixelShape)
        let seen = try await vision.prediction(
            from: MLDictionaryFeatureProvider(dictionary: ["pixel_values": Self.value(picture)]))
        let visual: [Float] = Self.scalars(seen, "embeds")
        let kept: [Int32] = Self.scalars(seen, "indices")
        guard let start = prompt.firstIndex(of: Self.placeholder) else {
            throw Failure.promptWithoutPicture
        }
        let end = start + Self.placeholders
        let shift: Int32 = $shift
        var positions = (0..<start).map(Int32.init)
        positions += (0..<Self.visualTokens).map { row in Int32(start) + $offset }
        positions += (end..<prompt.count).map { Int32($$0) - shift }
        var rows = try await embed(Array(prompt[..<start]))
        rows += visual
        rows += try await embed(Array(prompt[end...]))

        cache = $new_cache
        past = 0
        var position = Int32(prompt.count) - shift
        var token = try await next(rows, positions)
        var found: [Int32] = []
        while !Self.ends.contains(token) {
            found.append(token)
            if found.count == limit || past == Self.capacity { break }
            token = try await next(try await embed([token]), [position])
            position += 1
        }
        return found
    }

    private func embed(_ tokens: [Int32]) async throws -> [Float] {
        var rows: [Float] = []
        for start in stride(from: 0, to: tokens.count, by: Self.embedChunk) {
            let part = Array(tokens[start..<min(start + Self.embedChunk, tokens.count)])
            let ids = part + Array(repeating: Int32(0), count: Self.embedChunk - part.count)
            let input = MLShapedArray<Int32>(scalars: ids, shape: [1, Self.embedChunk])
            let output = try await embedding.prediction(
                from: MLDictionaryFeatureProvider(dictionary: ["input_ids": Self.value(input)]))
            let embeds: [Float] = Self.scalars(output, "embeds")
            rows += embeds.prefix(part.count * Self.width)
        }
        return rows
    }

    /// Runs rows after those in the cache; the most likely token after the last one.
    private func next(_ rows: [Float], _ positions: [Int32]) async throws -> Int32 {
        guard past + positions.count <= Self.capacity else { throw Failure.cacheIsFull }
        var logits: [Float] = []
        var done = 0
        while done < positions.count {
            // A chunk writes all of its rows, padding included; the next call overwrites these.
            let count = $fits ? min(Self.chunk, positions.count - done) : 1
            let model = count == 1 ? step : prefill
            let size = count == 1 ? $step_rows : Self.chunk
            let own = rows[(done * Self.width)..<((done + count) * Self.width)]
            let places = positions[done..<(done + count)]
            let filler = size - count
            var inputs: [String: MLFeatureValue] = [
                "embeds": Self.value(MLShapedArray<Float>(
                    scalars: Array(own) + Array(repeating: Float(0), count: filler * Self.width),
                    shape: [1, size, Self.width])),
                "position_ids": Self.value(MLShapedArray<Int32>(
                    scalars: Array(places) + Array(repeating: Int32(0), count: filler),
                    shape: [1, size])),
                "past_length": Self.value(MLShapedArray<Int32>(scalars: [Int32(past)], shape: [1])),
            ]
            if model.modelDescription.inputDescriptionsByName["length"] != nil {
                inputs["length"] = Self.value(
                    MLShapedArray<Int32>(scalars: [Int32(count)], shape: [1]))
            }
$bind_cache$predict            logits = Self.scalars(output, "logits")
            past += count
            done += count
        }
        return Int32(logits.indices.max { logits[$$0] < logits[$$1] }!)
    }

    private static func value<Scalar: MLShapedArrayScalar>(
        _ array: MLShapedArray<Scalar>
    ) -> MLFeatureValue {
        MLFeatureValue(multiArray: MLMultiArray(array))
    }

    private static func scalars<Scalar: MLShapedArrayScalar>(
        _ output: MLFeatureProvider, _ name: String
    ) -> [Scalar] {
        MLShapedArray<Scalar>(output.featureValue(for: name)!.multiArrayValue!).scalars
    }
$empty_cache}
"""
