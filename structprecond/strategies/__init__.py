"""Strategies: one optimization rule a file, with the optimizer that runs it."""
