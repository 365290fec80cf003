"""torch module -> checked ONNX graph."""
