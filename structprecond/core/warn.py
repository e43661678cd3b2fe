"""Warnings that point at the user's line, through frames of this library and torch."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import torch

_INSIDE = (
    str(Path(__file__).parents[1]),
    str(Path(torch.__file__).parent),
    contextlib.__file__,  # steps run in context managers
)


def warn(message: str) -> None:
    """Warn at the line that called into this library, directly or through torch."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def warn_once(given: set[str], kind: str, message: str | None) -> None:
    """Warn unless a warning of the kind was given, which the set remembers.

    Args:
        given: The kinds of warnings that were given.
        kind: The kind of this one.
        message: The message; None for no warning.
    """
    if message is not None and kind not in given:
        given.add(kind)
        warn(message)
