"""Altered copies of a reference model, for tests that ask the stock classes what is right."""

from __future__ import annotations

import json
import shutil

import numpy as np
from PIL import Image

from pocketvlm.reference import reference_model_path


def copy_model(name, target):
    shutil.copytree(reference_model_path(name), target)
    return target


def edit_json(path, change):
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def picture():
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (96, 96, 3), np.uint8))
