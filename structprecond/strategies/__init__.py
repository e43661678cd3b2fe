"""Strategies: one update rule per file, with its optimizer."""
