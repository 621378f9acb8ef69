"""Calibration: streaming statistics of activations, reduced inside the graph while onnxruntime runs it."""
