"""Answers from an ExecuTorch program, through ExecuTorch's Python runtime."""
