"""Classes of structured matrices, by their names in `structures=`."""

from __future__ import annotations

import copyreg
import re
from abc import ABCMeta
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias, TypeVar, cast

from structprecond.errors import StructureError
from structprecond.structures.base import StructuredMatrix
from structprecond.structures.block_diagonal import BlockDiagonalMatrix
from structprecond.structures.bordered import (
    TrilBottomRightDiagMatrix,
    TrilTopLeftDiagMatrix,
    TriuBottomRightDiagMatrix,
    TriuTopLeftDiagMatrix,
)
from structprecond.structures.dense import DenseMatrix
from structprecond.structures.diagonal import DiagonalMatrix
from structprecond.structures.hierarchical import HierarchicalMatrix
from structprecond.structures.toeplitz import TrilToeplitzMatrix, TriuToeplitzMatrix

Structure: TypeAlias = type[StructuredMatrix] | None
"""The structure of one axis: a class of structured matrices, or None for no factor."""

T = TypeVar("T")
PerAxis: TypeAlias = T | Mapping[int, T | tuple[T, ...]]
"""A value for all axes, or a dict from the number of axes to values: `{1: a, 2: (a, b)}`."""

StructureSpec: TypeAlias = PerAxis[str | type[StructuredMatrix]]

AUTO = "auto"
"""The name by which `structures=` leaves the choice to the strategy."""

SUPPORTED_STRUCTURES: dict[str, type[StructuredMatrix] | None] = {
    "dense": DenseMatrix,
    "diagonal": DiagonalMatrix,
    "block<k>diagonal": BlockDiagonalMatrix,
    "hierarchical<k1>_<k2>": HierarchicalMatrix,
    "triltoeplitz": TrilToeplitzMatrix,
    "triutoeplitz": TriuToeplitzMatrix,
    "triltopleftdiag": TrilTopLeftDiagMatrix,
    "trilbottomrightdiag": TrilBottomRightDiagMatrix,
    "triutopleftdiag": TriuTopLeftDiagMatrix,
    "triubottomrightdiag": TriuBottomRightDiagMatrix,
    "none": None,
}
"""The names for `structures=`, with `<k>` for any positive number."""


@cache
def structure_class(name: str) -> type[StructuredMatrix]:
    """Return the class of a structure by name.

    Args:
        name: A name of `SUPPORTED_STRUCTURES`, with a number in place of each `<k>`.

    Raises:
        StructureError: If there is no such structure, or it is `"none"`, which has no class.

    Example:
        >>> structure_class("block64diagonal").block_size
        64
    """
    if match := re.fullmatch(r"block([1-9]\d*)diagonal", name):
        return _sized(BlockDiagonalMatrix, name, block_size=int(match[1]))
    if match := re.fullmatch(r"hierarchical(\d+)_(\d+)", name):
        return _sized(HierarchicalMatrix, name, top=int(match[1]), bottom=int(match[2]))
    structure = SUPPORTED_STRUCTURES.get(name)
    if structure is None or "<" in name:
        raise StructureError(f"Unknown structure {name!r}. Use one of {_known_names()}.")
    return structure


def _sized(base: type[StructuredMatrix], name: str, **sizes: int) -> type[StructuredMatrix]:
    """Make a subclass with fixed sizes."""
    namespace = {"__doc__": base.__doc__, "__module__": base.__module__, "name": name, **sizes}
    return cast("type[StructuredMatrix]", _SizedClass(name, (base,), namespace))


class _SizedClass(ABCMeta):
    """The type of classes that are made from a name, and pickled by it."""


def _reduce(cls: Any) -> tuple[Any, ...]:
    return structure_class, (cls.name,)


copyreg.pickle(_SizedClass, _reduce)


def per_axis(value: PerAxis[T], order: int, what: str, units: str) -> tuple[T, ...]:
    """Return the values of the axes of a tensor with `order` axes.

    Args:
        value: One value for all axes of all tensors, or a dict from the order to one value or to a
            tuple with one value per axis.
        order: The number of axes, at least 1.
        what: The name of the argument, for errors.
        units: The parameters concerned, for errors.

    Raises:
        StructureError: If the dict has no entry for the order, or a tuple of another length.

    Example:
        >>> per_axis({1: "diagonal", 2: ("dense", "none")}, 2, "structures", "fc.weight")
        ('dense', 'none')
    """
    if not isinstance(value, Mapping):
        return (value,) * order
    if wrong := [key for key in value if not isinstance(key, int) or key < 1]:
        raise StructureError(
            f"{what}={dict(value)} has the keys {wrong}; keys must be numbers of axes, at least 1."
        )
    if order not in value:
        raise StructureError(
            f"{what}={dict(value)} has no entry for tensors with {order} axes, such as {units}. "
            f"Add {order}: ..., or give one value for all axes."
        )
    entry = value[order]
    if not isinstance(entry, tuple):
        return (entry,) * order
    if len(entry) != order:
        raise StructureError(
            f"{what}={dict(value)} gives {len(entry)} values for tensors with {order} axes, such "
            f"as {units}. Give one value, or a tuple of {order}."
        )
    return entry


def resolve_structures(
    spec: StructureSpec, order: int, units: str, auto: Sequence[Structure] | None = None
) -> tuple[Structure, ...]:
    """Return the class of structured matrices (None for no factor) of every axis.

    Args:
        spec: What the user gave.
        order: The number of axes.
        units: The parameters concerned, for errors.
        auto: What `"auto"` stands for on each axis. Default: None, dense matrices.
    """
    entries = per_axis(spec, order, "structures", units)
    usual = (DenseMatrix,) * order if auto is None else auto
    return tuple(_resolve(entry, own) for entry, own in zip(entries, usual, strict=True))


def _resolve(entry: object, auto: Structure) -> Structure:
    if isinstance(entry, str):
        if entry == AUTO:
            return auto
        return None if entry == "none" else structure_class(entry)
    if isinstance(entry, type) and issubclass(entry, StructuredMatrix):
        return entry
    raise StructureError(
        f"structures= takes names and subclasses of StructuredMatrix, got {entry!r}. "
        f"Known names are {_known_names()}."
    )


def _known_names() -> str:
    return ", ".join((AUTO, *SUPPORTED_STRUCTURES))
