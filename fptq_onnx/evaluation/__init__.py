"""Evaluation: perplexity, and how far a quantized model is from its float model."""
