"""Windows: the view of each parameter's entries in a stack, which makes grouping free."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structprecond.core.units import Unit


@dataclass(frozen=True)
class Window:
    """A strided view of a stack with one parameter's entries.

    Args:
        size: The parameter's shape.
        stride: Its strides in the stack.
        offset: Its first entry in the stack.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, stack: Tensor) -> Tensor:
        """Return the view of a contiguous stack."""
        return stack.as_strided(self.size, self.stride, stack.storage_offset() + self.offset)


def find_windows(unit: Unit) -> tuple[Window, ...] | None:
    """Return the window of each parameter in the unit's rows.

    Returns:
        None if `ungroup` copies or does not cover the grouped tensor: then every step must call
        `group` and `ungroup`.
    """
    rows = (unit.rows,) if unit.rule.stacked else ()
    # never written to, so the memory for this tensor is never touched
    grouped = torch.empty(*rows, *unit.shape, device="cpu")
    views = unit.split(grouped)
    start = grouped.untyped_storage().data_ptr()
    shared = all(v.untyped_storage().data_ptr() == start for v in views)
    if not shared or sum(v.numel() for v in views) != grouped.numel():
        return None
    return tuple(Window(tuple(v.shape), v.stride(), int(v.storage_offset())) for v in views)
