"""Calibration: what the runtime's kernels reach on this machine, in at most a minute.

Predictions of time (`prediction.roofline`) are made from it and from nothing else.
"""
