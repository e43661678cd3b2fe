"""Bitwise comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def first_difference(a: Any, b: Any, where: str = "") -> str | None:
    """Return the first difference of nested containers of tensors and plain values, or None.

    Tensors are compared by dtype, shape and bits, on any device. Two parameters must be the same
    object. Dicts must have their keys in the same order.
    """
    if isinstance(a, nn.Parameter) and isinstance(b, nn.Parameter):
        return None if a is b else f"{where or 'the parameter'} is another parameter"
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return None if _same_tensor(a, b) else f"{where or 'the tensor'} differs"
    if type(a) is not type(b):
        return f"{where} is a {type(a).__name__} here and a {type(b).__name__} there"
    if isinstance(a, dict):
        if list(a) != list(b):
            return f"{where} has {[*map(str, a)]} here and {[*map(str, b)]} there"
        found = (first_difference(a[key], b[key], f"{where}[{key!r}]") for key in a)
        return next((f for f in found if f is not None), None)
    if isinstance(a, list | tuple) and len(a) == len(b):
        both = enumerate(zip(a, b, strict=True))
        found = (first_difference(x, y, f"{where}[{i}]") for i, (x, y) in both)
        return next((f for f in found if f is not None), None)
    return None if a == b else f"{where} is {a!r} here and {b!r} there"


def same_bits(a: Any, b: Any) -> bool:
    """Return whether `first_difference` is None."""
    return first_difference(a, b) is None


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(_bits_of(a), _bits_of(b))


def _bits_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
