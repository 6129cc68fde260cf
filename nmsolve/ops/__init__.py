"""What users call, checked once. Importing this package registers every operator ``torch.ops.nmsolve.*``."""

from nmsolve.ops import assignment, columns, hierarchical, mask_operators, plan_operators

__all__ = ["assignment", "columns", "hierarchical", "mask_operators", "plan_operators"]
