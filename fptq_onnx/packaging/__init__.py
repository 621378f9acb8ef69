"""Model folders for servers: Triton Inference Server."""
