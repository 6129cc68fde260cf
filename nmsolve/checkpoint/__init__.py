"""Safetensors checkpoints on disk: reading, choosing tensors, masking them, and the masks themselves."""

from nmsolve.checkpoint.on_disk import mask_checkpoint

__all__ = ["mask_checkpoint"]
