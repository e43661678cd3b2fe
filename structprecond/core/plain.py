"""Converts values for checkpoints: plain values, or descriptions of other objects."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from decimal import Decimal
from fractions import Fraction
from operator import is_
from typing import Any

from torch import Tensor

from structprecond.core.policies import Policy
from structprecond.core.routing import Routing
from structprecond.core.strategy import Strategy
from structprecond.groups import PreconditionerGroup
from structprecond.structures import StructuredMatrix


def plain_value(value: Any) -> Any:
    """Return a value that `torch.load(weights_only=True)` reads, or else a description."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return type(value)(plain_value(v) for v in value)
    number = plain_number(value)
    return describe_object(value) if number is value else number


def plain_number(value: Any) -> Any:
    """Return a number, or an array without axes, as int, float or bool; others as they are.

    Numbers in lists and tuples are converted too. Tensors stay.
    """
    if value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        numbers = type(value)(map(plain_number, value))
        return value if all(map(is_, numbers, value)) else numbers
    if isinstance(value, Decimal | Fraction):
        return float(value)
    # numpy's, without importing it
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return value.item()
    return value


def describe_object(value: Any) -> str:
    """Describe a callable, strategy, grouping or structure: equal objects, equal descriptions.

    Descriptions are compared with those of older versions. So they omit fields with default values,
    which may be new, and addresses.
    """
    if isinstance(value, Mapping):
        entries = sorted((repr(k), describe_object(v)) for k, v in value.items())
        return "{" + ", ".join(f"{k}: {v}" for k, v in entries) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(describe_object(v) for v in value) + ")"
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, type) and issubclass(value, StructuredMatrix):
        return repr(value.name)
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Strategy | Routing | PreconditionerGroup | Policy) and is_dataclass(value):
        values = {
            f.name: getattr(value, f.name) for f in fields(value) if not _is_default(value, f)
        }
        given = (f"{name}={describe_object(v)}" for name, v in values.items())
        return f"{type(value).__qualname__}({', '.join(given)})"
    if getattr(type(value), "__repr__") is object.__repr__:  # noqa: B009
        return type(value).__qualname__
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _is_default(value: Any, field: Field[Any]) -> bool:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return default is not MISSING and bool(getattr(value, field.name) == default)
