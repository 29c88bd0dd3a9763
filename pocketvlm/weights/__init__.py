"""Compressed weights: the integers that a method chose, in a form that every exporter can carry.

A form is immutable, knows its exact bytes, and `dequantize()` in float32 is the definition of
truth: torch evaluates it, each exporter packs the same codes into its runtime's own layout, and a
test unpacks them again. Scales and codebooks are rounded to float16 where they are made, so that a
runtime which stores float16 loses nothing.
"""

from pocketvlm.packing import pack_codes, unpack_codes
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.codebook import CodebookWeight, Lookup
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.floats import is_float, keeps_of, with_values
from pocketvlm.weights.form import WeightForm, total_stored_bytes
from pocketvlm.weights.kept import KeptFloats, KeptIndices, KeptIntegers, KeptValues
from pocketvlm.weights.modules import FormEmbedding, FormLinear, cache_dense_weights
from pocketvlm.weights.sparse import SparseWeight

__all__ = [
    "FORMS",
    "AffineWeight",
    "CodebookWeight",
    "DenseWeight",
    "FormEmbedding",
    "FormLinear",
    "KeptFloats",
    "KeptIndices",
    "KeptIntegers",
    "KeptValues",
    "Lookup",
    "SparseWeight",
    "WeightForm",
    "cache_dense_weights",
    "is_float",
    "keeps_of",
    "pack_codes",
    "total_stored_bytes",
    "unpack_codes",
    "with_values",
]

FORMS: tuple[type[WeightForm], ...] = (
    DenseWeight,
    AffineWeight,
    CodebookWeight,
    SparseWeight,
)
