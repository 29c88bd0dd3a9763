"""Answers from a bundle with numpy, Pillow, tokenizers, jinja2 and the runtime's own wheel.

Nothing here imports torch or transformers: this package is what an app has to reimplement, and
docs/runtime.md walks through it.
"""
