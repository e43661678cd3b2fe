"""The state of a strategy: nested stacked tensors, named after their fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from structprecond.structures import StructuredMatrix

Rows = slice | Tensor
"""Rows of a stack: `slice(None)` for all of them, else their indices."""

ALL_ROWS = slice(None)

ByParameter: TypeAlias = Mapping[Any, Mapping[str, Tensor]]
"""The tensors of a state under each parameter by name."""


class State:
    """Base of all states: subclasses are dataclasses of stacked tensors `(b, ...)`.

    A field is a tensor, a `StructuredMatrix`, None, or a tuple of these. Dimension 0 of every
    tensor indexes the b rows of the stack.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Momentum(State):
        ...     buffer: Tensor
        >>> Momentum(torch.zeros(2, 3)).named_tensors().keys()
        dict_keys(['buffer'])
    """

    def named_tensors(self) -> dict[str, Tensor]:
        """Return all tensors by dotted name, e.g. `preconditioners.0.mat`."""
        return dict(_named(self, ""))

    def map(self, fn: Callable[[Tensor], Tensor]) -> Any:
        """Return a state of the same layout with `fn` applied to every tensor."""
        return _map(self, fn)

    @property
    def nbytes(self) -> int:
        """The size of the tensors in bytes."""
        return sum(t.numel() * t.element_size() for t in self.named_tensors().values())


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, tuple):
        yield from ((str(i), child) for i, child in enumerate(node))
    elif is_dataclass(node):
        yield from ((field.name, getattr(node, field.name)) for field in fields(node))


def _named(node: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield name, node
    for key, child in _children(node):
        yield from _named(child, f"{name}.{key}" if name else key)


def _map(node: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(node, Tensor):
        return fn(node)
    if isinstance(node, StructuredMatrix):
        return node._map(fn)
    if isinstance(node, tuple):
        return tuple(_map(child, fn) for child in node)
    if is_dataclass(node) and not isinstance(node, type):
        return replace(node, **{key: _map(child, fn) for key, child in _children(node)})
    return node


S = TypeVar("S", bound=State)


@contextmanager
def rows_of(state: S, rows: Rows) -> Iterator[S]:
    """Yield some rows of a state, and write them back after the block.

    `ALL_ROWS` yields the state itself, without a copy. Otherwise, if the block raises, the rows
    stay unchanged.
    """
    if isinstance(rows, slice) and rows == ALL_ROWS:
        yield state
        return
    part: S = state.map(lambda t: t[on_device_of(rows, t)])
    yield part
    targets, sources = state.named_tensors(), part.named_tensors()
    for name, target in targets.items():
        target[on_device_of(rows, target)] = sources[name]


def on_device_of(rows: Rows, tensor: Tensor) -> Rows:
    """Return rows as an index on the tensor's device."""
    return rows if isinstance(rows, slice) else rows.to(tensor.device)


def select(rows: torch.Tensor) -> Rows | None:
    """Turn a mask `(b,)` on the CPU into rows; None if no row is selected."""
    if bool(rows.all()):
        return ALL_ROWS
    return rows.nonzero().squeeze(1) if bool(rows.any()) else None
