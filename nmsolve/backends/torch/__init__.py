"""The reference in plain PyTorch: on any device, in float64 for float64 scores, written to be read."""
