from __future__ import annotations

import pytest
import torch

from pocketvlm.compress.layerwise.layer_store import FinishedLayer, LayerStore
from pocketvlm.compress.layerwise.scratch import (
    find_document,
    find_tensors,
    keep_document,
    keep_tensors,
)
from pocketvlm.weights.dense import DenseWeight

TENSORS = {
    "codes": torch.arange(24, dtype=torch.uint8).reshape(4, 6),
    "scale": torch.tensor(0.1, dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
    "none": torch.empty(0, 3),
}


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_tensors_come_back_as_they_were(tmp_path):
    path = tmp_path / "a.safetensors"
    assert find_tensors(path) is None
    keep_tensors(path, TENSORS, {"row": [1, 0.1, None]})
    tensors, document = find_tensors(path)
    assert document == {"row": [1, 0.1, None]}
    assert tensors.keys() == TENSORS.keys()
    for name, values in TENSORS.items():
        assert tensors[name].dtype == values.dtype
        assert torch.equal(tensors[name], values)


def test_no_flipped_bit_is_used(tmp_path):
    """Of every bit of the file: either it is not read, or what is read is what was written."""
    path = tmp_path / "a.safetensors"
    keep_tensors(path, {"x": TENSORS["codes"]}, {"row": "word"})
    whole = path.read_bytes()
    unused = 0
    for bit in range(len(whole) * 8):
        path.write_bytes(flipped(whole, bit))
        found = find_tensors(path)
        if found is not None:
            assert found[1] == {"row": "word"}
            assert list(found[0]) == ["x"]
            assert torch.equal(found[0]["x"], TENSORS["codes"])
        else:
            unused += 1
    assert unused > 0.9 * len(whole) * 8


def test_no_flipped_bit_of_a_document_is_used(tmp_path):
    path = tmp_path / "a.json"
    document = {"scores": {"layer": 0.1}, "steps": [[1, 2]], "text": "é"}
    keep_document(path, document)
    whole = path.read_bytes()
    assert find_document(path) == document
    for bit in range(len(whole) * 8):
        path.write_bytes(flipped(whole, bit))
        assert find_document(path) in (None, document)
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        assert find_document(path) is None
    path.unlink()
    assert find_document(path) is None
    path.mkdir()
    assert find_document(path) is None


def test_a_document_without_its_digest_is_not_used(tmp_path):
    (tmp_path / "a.json").write_text('{"loss": 1.0}')
    assert find_document(tmp_path / "a.json") is None


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_a_damaged_layer_is_made_again(tmp_path, part):
    store = LayerStore(tmp_path)
    layer = FinishedLayer(form=DenseWeight(values=torch.randn(8, 4)), row={"name": "a"})
    store.save("a", layer)
    store.save("b", layer)
    assert torch.equal(store.load("a").form.dequantize(), layer.form.dequantize())
    first, second = sorted(tmp_path.iterdir())
    content = first.read_bytes()
    first.write_bytes(flipped(content, int(len(content) * part) * 8))
    assert store.load("a") is None
    assert store.load("b") is not None
    first.write_bytes(second.read_bytes())  # another layer's file in its place
    assert store.load("a") is None
