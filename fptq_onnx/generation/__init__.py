"""Text generation with a key/value cache in plain onnxruntime, for every export family."""
