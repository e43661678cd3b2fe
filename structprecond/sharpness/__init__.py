"""Sharpness-aware minimization: SAM, its perturbation, and batch norm in its second pass."""
