"""ARM64 on another processor: Debian's Python and PyPI's wheels under QEMU's user-mode emulation.

It computes what a phone's instruction set computes, kernel by kernel, and says nothing of speed.
"""
