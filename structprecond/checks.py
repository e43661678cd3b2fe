"""Checks of arguments: choices, flags and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, get_args

import torch
from torch import Tensor

from structprecond.errors import HyperparameterError, StructPrecondError

LARGEST_COUNT = 2**63 - 1
"""The largest count: counts are compared with tensors of 64-bit integers."""
A_COUNT = "an integer of at least 1 and below 2^63"


def check_value(name: str, value: Any, allowed: Callable[[Any], bool], requirement: str) -> None:
    """Raise `HyperparameterError` unless a value is allowed; an error in `allowed` means no."""
    # torch's optimizers take a learning rate with one axis as well
    one = name == "lr" and isinstance(value, Tensor) and value.numel() == 1
    try:
        fine = bool(allowed(value.reshape(()) if one else value))
    except (TypeError, ValueError, RuntimeError, ArithmeticError):
        fine = False
    if not fine:
        raise HyperparameterError(f"{name} must be {requirement}, got {value!r}.")


def as_number(value: Any) -> float:
    """Return a number as a float.

    Numbers are those of Python and numpy, and real tensors without axes; True and False are none.

    Raises:
        TypeError: If the value is no number, such as an array.
        OverflowError: If it is too large for a float.

    Example:
        >>> as_number(3)
        3.0
    """
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        fine = value.ndim == 0 and not value.is_complex() and value.dtype != torch.bool
    else:
        fine = isinstance(value, Real) and not isinstance(value, bool)
    if not fine:
        raise TypeError(f"{value!r} is not a number.")
    return float(value)


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise `StructPrecondError` unless a value is one of a `Literal`'s."""
    known = get_args(choices)
    # compare types first: comparing an array has no truth value
    if not any(type(value) is type(choice) and value == choice for choice in known):
        *most, last = map(repr, known)
        raise StructPrecondError(f"{name} must be {', '.join(most)} or {last}, got {value!r}.")


def check_flags(**flags: object) -> None:
    """Raise `StructPrecondError` unless all values are True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise StructPrecondError(f"{name} must be True or False, got {value!r}.")


def check_positive(**numbers: Any) -> None:
    """Raise `HyperparameterError` unless all values are finite numbers above 0."""
    for name, value in numbers.items():
        check_value(name, value, lambda v: 0 < as_number(v) < math.inf, "a finite number above 0")


def check_nonnegative(**numbers: Any) -> None:
    """Raise `HyperparameterError` unless all values are finite numbers of at least 0."""
    for name, value in numbers.items():
        check_value(
            name, value, lambda v: 0 <= as_number(v) < math.inf, "a finite number of at least 0"
        )


def is_count(value: object) -> bool:
    """Return whether a value is an integer from 1 to `LARGEST_COUNT`."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_COUNT


def check_count(**numbers: Any) -> None:
    """Raise `StructPrecondError` unless all values are integers from 1 to `LARGEST_COUNT`."""
    for name, value in numbers.items():
        if not is_count(value):
            raise StructPrecondError(f"{name} must be {A_COUNT}, got {value!r}.")
