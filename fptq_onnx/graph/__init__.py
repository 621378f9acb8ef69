"""Reading ONNX graphs: linear layers, their roles, norms, residual blocks and scale sites."""
