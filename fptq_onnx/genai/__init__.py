"""Model folders of onnxruntime-genai: their configuration, and converting one into another."""
