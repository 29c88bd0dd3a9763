"""External data of a graph: signed files of the bundle, and nothing else."""

from __future__ import annotations

import shutil

import onnx
import pytest
from onnx import TensorProto, helper

from pocketvlm.bundle import Bundle, sign_bundle
from pocketvlm.errors import BundleError
from pocketvlm.runtime.onnx.external_data import require_signed_data
from pocketvlm.runtime.onnx.runner import OnnxRunner

OUTSIDE = "../../secret.bin"


def external(location: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def graph_of(**parts):
    return helper.make_graph([], "g", [], [], **parts)


def in_a_constant(location):
    node = helper.make_node("Constant", [], ["c"])
    node.attribute.append(helper.make_attribute("value", external(location)))
    return helper.make_graph([node], "g", [], [])


def in_a_branch(location):
    node = helper.make_node("If", ["x"], ["y"])
    node.attribute.append(helper.make_attribute("then_branch", in_a_constant(location)))
    return helper.make_graph([node], "g", [], [])


def in_a_sparse_tensor(location):
    graph = graph_of()
    graph.sparse_initializer.add(values=external(location))
    return graph


def in_a_list(location):
    node = helper.make_node("Custom", [], ["c"])
    node.attribute.append(helper.make_attribute("values", [external(location)]))
    return helper.make_graph([node], "g", [], [])


PLACES = {
    "initializer": lambda location: graph_of(initializer=[external(location)]),
    "constant": in_a_constant,
    "branch": in_a_branch,
    "sparse": in_a_sparse_tensor,
    "list": in_a_list,
}


@pytest.fixture
def copy(llava, tmp_path):
    shutil.copytree(llava.bundle.path, tmp_path / "bundle")
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    return tmp_path / "bundle"


def resigned(copy, llava):
    sign_bundle(copy, llava.bundle.manifest)
    return Bundle.open(copy)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "location",
    [
        OUTSIDE,
        "/etc/hostname",
        "weights2.bin",
        "*/_ORT_MEM_ADDR_/*",
        "../README.md",
        "../onnx/../x",
    ],
)
def test_locations_that_are_no_signed_file_are_refused(copy, llava, place, location):
    model = helper.make_model(PLACES[place](location))
    (copy / "onnx" / "decoder.onnx").write_bytes(model.SerializeToString())
    bundle = resigned(copy, llava)
    with pytest.raises(BundleError, match=r"decoder.onnx: has weights at .* is not a signed file"):
        require_signed_data(bundle, "onnx/decoder.onnx")
    assert location not in bundle.manifest.files


def test_a_function_of_the_model_is_looked_at(copy, llava):
    model = helper.make_model(graph_of())
    model.functions.add(name="f").node.extend(in_a_constant(OUTSIDE).node)
    (copy / "onnx" / "decoder.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="has weights at"):
        require_signed_data(resigned(copy, llava), "onnx/decoder.onnx")


def test_the_runner_refuses_before_the_runtime_reads(copy, llava):
    file = copy / "onnx" / "decoder.onnx"
    model = onnx.load(file, load_external_data=False)
    moved = 0
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = OUTSIDE
                moved += 1
    assert moved
    file.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"decoder.onnx: has weights at '../../secret.bin'"):
        OnnxRunner(resigned(copy, llava))


def test_a_link_among_the_weights_is_refused(copy, llava):
    (copy / "onnx" / "weights.bin").unlink()
    (copy / "onnx" / "weights.bin").symlink_to("../../secret.bin")
    with pytest.raises(BundleError, match=r"weights.bin: leads out of its folder"):
        OnnxRunner(Bundle.open(copy, verify=False))
