"""What is installed, what this machine can run, whether a model will load, and the fix for whatever is wrong."""
