"""Checks of arguments: choices, flags and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

from structprecond.errors import HyperparameterError, StructPrecondError


def check_value(name: str, value: Any, allowed: Callable[[Any], bool], requirement: str) -> None:
    """Raise `HyperparameterError` unless a value is allowed; an error in `allowed` means no."""
    try:
        fine = bool(allowed(value))
    except (TypeError, ValueError, RuntimeError):
        fine = False
    if not fine:
        raise HyperparameterError(f"{name} must be {requirement}, got {value!r}.")


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
        check_value(name, value, lambda v: 0 < v < math.inf, "a finite number above 0")


def check_nonnegative(**numbers: Any) -> None:
    """Raise `HyperparameterError` unless all values are finite numbers of at least 0."""
    for name, value in numbers.items():
        check_value(name, value, lambda v: 0 <= v < math.inf, "a finite number of at least 0")


def is_count(value: object) -> bool:
    """Return whether a value is an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_count(**numbers: Any) -> None:
    """Raise `StructPrecondError` unless all values are integers of at least 1."""
    for name, value in numbers.items():
        if not is_count(value):
            raise StructPrecondError(f"{name} must be an integer of at least 1, got {value!r}.")
