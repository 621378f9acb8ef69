"""Speed and memory of whole models: prefill, decode, and where the time goes."""
