"""What others published for phones weighs what a plan with their choices predicts, within 10 %."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from pocketvlm.pipeline.plan import Plan, plan
from pocketvlm.recipes.load import recipe_from_document
from pocketvlm.reference.shapes import load_shape

Q8_0 = {"bits": 8, "group_size": 32, "symmetric": True}  # llama.cpp: an fp16 scale per 32 codes
Q4_0 = {"bits": 4, "group_size": 32, "symmetric": True}
ROWS_8 = {"bits": 8, "group_size": None, "symmetric": True}  # torchao's 8da8w: a scale per row
LANGUAGE = ("decoder", "embedding", "head")
PICTURES = ("tower", "projector", "other")  # a projector file of llama.cpp (mmproj)
EVERYTHING = (*LANGUAGE, *PICTURES)


@dataclass(frozen=True)
class Published:
    """One file that an app downloads.

    Attributes:
        shape: The model.
        file: Who published it, and its name.
        megabytes: Its size; to the byte where that is known.
        parts: Parts of the model that it holds.
        rules: How its matrices are stored; those without a rule are float.
        target: The target whose files resemble it.
    """

    shape: str
    file: str
    megabytes: float
    parts: tuple[str, ...]
    rules: tuple[dict[str, Any], ...]
    target: str = "onnx"


EVERY_Q8_0 = ({"match": ".*", **Q8_0},)
# 4304 columns are not a whole number of blocks of 32: llama.cpp leaves such a matrix in fp16.
ALL_BUT_FC2 = (
    {"part": "projector", **Q8_0},
    {"match": r".*vision.*(q|k|v|out)_proj", **Q8_0},
    {"match": ".*vision.*fc1", **Q8_0},
)
FILES = [
    Published("smolvlm-256m", "ggml-org: SmolVLM-256M Q8_0", 175, LANGUAGE, EVERY_Q8_0),
    Published("smolvlm-256m", "ggml-org: SmolVLM-256M mmproj Q8_0", 104, PICTURES, EVERY_Q8_0),
    Published("smolvlm-500m", "ggml-org: SmolVLM2-500M Q8_0", 436.808704, LANGUAGE, EVERY_Q8_0),
    Published(
        "smolvlm-500m", "ggml-org: SmolVLM2-500M mmproj Q8_0", 108.785184, PICTURES, EVERY_Q8_0
    ),
    Published(
        "smolvlm-500m",
        "mlboydaisuke: SmolVLM2-500M 8da8w .pte",
        518,
        EVERYTHING,
        ({"match": ".*", **ROWS_8},),
        target="executorch",
    ),
    Published("smolvlm-2.2b", "Qualcomm AI Hub: SmolVLM2-2.2B Q8_0", 1930, LANGUAGE, EVERY_Q8_0),
    Published(
        "smolvlm-2.2b", "ggml-org: SmolVLM2-2.2B mmproj Q8_0", 592.523200, PICTURES, ALL_BUT_FC2
    ),
    Published("internvl3-1b", "ggml-org: InternVL3-1B Q8_0", 675.206560, LANGUAGE, EVERY_Q8_0),
    Published(
        "internvl3-1b", "ggml-org: InternVL3-1B mmproj Q8_0", 332.567840, PICTURES, EVERY_Q8_0
    ),
    Published("lfm2-vl-1.6b", "LiquidAI: LFM2-VL-1.6B Q8_0", 1246.252448, LANGUAGE, EVERY_Q8_0),
    Published(
        "lfm2-vl-1.6b", "LiquidAI: LFM2-VL-1.6B mmproj Q8_0", 564.115648, PICTURES, ALL_BUT_FC2
    ),
    Published(
        "llava-1.5-7b",
        "mys: ggml_llava-v1.5-7b Q4_0",
        3800,
        LANGUAGE,
        ({"part": "head", **Q8_0}, {"match": ".*", **Q4_0}),
    ),
    Published("glm-ocr", "ggml-org: GLM-OCR mmproj Q8_0", 462, PICTURES, EVERY_Q8_0),
    Published("qwen3-vl-2b", "Qwen: Qwen3VL-2B mmproj Q8_0", 445.053216, PICTURES, EVERY_Q8_0),
    Published(
        "llava-1.5-7b", "koboldcpp: mmproj v1.5 Q4_0", 177, PICTURES, ({"match": ".*", **Q4_0},)
    ),
]


@pytest.mark.parametrize("found", FILES, ids=lambda found: found.file)
def test_a_plan_predicts_what_was_published(found: Published):
    document = {
        "schema": 1,
        "name": "published",
        "stages": [{"method": "rtn", "rules": list(found.rules)}],
        "targets": [{"method": found.target}],
    }
    made: Plan = plan(load_shape(found.shape), recipe_from_document(document, where="test"))
    predicted = sum(made.part_bytes.get(part, 0) for part in found.parts) / 1e6
    assert predicted == pytest.approx(found.megabytes, rel=0.1), predicted / found.megabytes
