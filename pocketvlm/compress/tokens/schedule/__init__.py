"""Schedules of visual rows inside the decoder: one file per kind, `stage.py` has their table."""
