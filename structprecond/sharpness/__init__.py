"""Sharpness-aware steps, which take two gradients."""
