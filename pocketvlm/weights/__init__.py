"""Compressed weights: the integers that a method chose, in a form that every exporter can carry.

A form is immutable, knows its exact bytes, and `dequantize()` in float32 is the definition of
truth: torch evaluates it, each exporter packs the same codes into its runtime's own layout, and a
test unpacks them again. Scales and codebooks are rounded to float16 where they are made, so that a
runtime which stores float16 loses nothing.
"""
