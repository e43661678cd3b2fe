"""Checks what code from outside the library returns to a step."""

from __future__ import annotations

from reprlib import repr as short_repr
from typing import Any

import torch
from torch import Tensor

from structprecond.errors import StructPrecondError

# those of at least 16 bits, in which tensors can be added
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def usable(value: Any, like: Tensor, giver: str) -> Tensor:
    """Return a value in the dtype of a stack, if it has the shape and device of that stack.

    Args:
        value: What was returned.
        like: A stack of the expected shape and device.
        giver: What returned it, for the message.

    Raises:
        StructPrecondError: If it is not a dense floating-point tensor of that shape and device.

    Example:
        >>> usable(torch.ones(2, dtype=torch.float64), torch.zeros(2), "The hook").dtype
        torch.float32
    """
    if (
        isinstance(value, Tensor)
        and value.shape == like.shape
        and value.dtype in _DTYPES
        and value.device == like.device
        and value.layout == torch.strided
    ):
        return value.to(like.dtype)
    got = short_repr(value)
    if isinstance(value, Tensor):
        got = f"{tuple(value.shape)} of {value.dtype}, {value.layout}, on {value.device}"
    raise StructPrecondError(
        f"{giver} has to return a tensor of shape {tuple(like.shape)}, got {got}. Return a dense "
        f"tensor of that shape, with floating-point numbers of at least 16 bits, on {like.device}."
    )
