"""Calibration: image+text samples, and the statistics of each layer's inputs on them."""

from __future__ import annotations

from pocketvlm.calibration.source import CalibrationSet, Sample

__all__ = ["CalibrationSet", "Sample"]
