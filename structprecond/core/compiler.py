"""Keeps torch.compile out of steps."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def leave_to_python(cls: Any, method: str) -> None:
    """Exclude a method from torch.compile, which would recompile its bookkeeping at every step.

    Not a decorator: that would import the compiler with this library, which takes a second. torch
    imports it anyway when it makes an optimizer.
    """
    setattr(cls, method, torch.compiler.disable(getattr(cls, method)))
