"""Safetensors checkpoints on disk: reading, choosing tensors, masking them, and the masks themselves."""
