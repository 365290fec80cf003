"""How each stage is computed: torch modules, and the checked ONNX graphs made of them."""
