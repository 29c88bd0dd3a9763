"""Answers from ONNX graphs, through ONNX Runtime."""
