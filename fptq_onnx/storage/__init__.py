"""What a conversion keeps between its steps: results of finished blocks, and the hidden states between two blocks."""
