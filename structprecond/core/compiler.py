"""Keeping torch.compile out of steps."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def leave_to_python(cls: Any, method: str) -> None:
    """Let torch.compile leave a method to Python: its bookkeeping would be compiled every time.

    As a decorator this would import the compiler together with the module of the class, which takes
    a second; torch does so itself when it makes an optimizer.
    """
    setattr(cls, method, torch.compiler.disable(getattr(cls, method)))
