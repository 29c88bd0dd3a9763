"""ONNX graphs for ONNX Runtime: `target` is the stage, the others are what it is made of."""
