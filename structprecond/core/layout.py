"""The places of parameters in a stack, and the copies there and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Size, Tensor, nn

from structprecond.core.units import Unit
from structprecond.core.windows import Window, find_windows


class Layout:
    """The rows and windows of units that are stacked.

    Args:
        units: The units, all of the same grouped shape.

    Attributes:
        units: The units; unit i owns the rows `spans[i]`.
        params: What is updated: all their parameters, or copies.
        shapes: Their shapes at construction.
        spans: The rows of each unit.
        rows: The number of rows of the stack.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = list(units)
        self.params: list[nn.Parameter] = [t for unit in units for t in unit.tensors]
        self._members = [p for unit in units for p in unit.params]
        self.shapes: list[Size] = [p.shape for p in self.params]
        self.spans: list[slice] = []
        self._windows: list[Window] | None = []
        start = 0
        for unit in units:
            self.spans.append(slice(start, start + unit.rows))
            windows = find_windows(unit)
            if windows is None:
                self._windows = None
            elif self._windows is not None:
                shift = start * unit.shape.numel()
                self._windows += [replace(w, offset=w.offset + shift) for w in windows]
            start += unit.rows
        self.rows = start
        self._tile = self._find_tile()

    def _find_tile(self) -> Size | None:
        """Return the shape of all parameters if they fill the stack one after the other.

        In this common case, one call replaces a view per parameter.
        """
        first = self.params[0].shape
        tiles = self._windows or []
        strides = torch.empty(first, device="meta").stride()
        in_order = all(
            window == Window(tuple(first), strides, i * first.numel())
            for i, window in enumerate(tiles)
        )
        return first if tiles and in_order else None

    def live(self) -> list[bool]:
        """Return whether each unit takes part: its parameters require and have gradients."""
        if all(p.grad is not None and p.requires_grad for p in self._members):
            return [True] * len(self.units)
        return are_live(self.units)

    def per_param(self, live: Sequence[bool]) -> list[bool]:
        """Return whether the unit of each parameter is live."""
        return [on for on, unit in zip(live, self.units, strict=True) for _ in unit.tensors]

    def live_params(self, live: Sequence[bool]) -> list[nn.Parameter]:
        """Return the parameters of the live units."""
        if all(live):
            return self.params
        return [p for p, on in zip(self.params, self.per_param(live), strict=True) if on]

    def live_grads(self, live: Sequence[bool]) -> list[Tensor]:
        """Return the gradients of the live units."""
        # each read of an attribute takes torch 50 ns, so the gradient is read once
        return [grad for p in self.live_params(live) if (grad := p.grad) is not None]

    def live_shapes(self, live: Sequence[bool]) -> list[Size]:
        """Return the shapes that `live_params` had at construction."""
        if all(live):
            return self.shapes
        return [s for s, on in zip(self.shapes, self.per_param(live), strict=True) if on]

    def live_rows(self, live: Sequence[bool]) -> Tensor:  # (rows,), bool on the CPU
        """Return whether the unit of each row is live."""
        if all(live):
            return torch.ones(self.rows, dtype=torch.bool, device="cpu")
        rows = [on for on, unit in zip(live, self.units, strict=True) for _ in range(unit.rows)]
        return torch.tensor(rows, dtype=torch.bool, device="cpu")

    def live_units(self, rows: Tensor) -> list[bool]:
        """Undo `live_rows`."""
        mask = rows.tolist()
        return [mask[span.start] for span in self.spans]

    def gather(self, tensors: Sequence[Tensor], live: Sequence[bool], into: Tensor) -> None:
        """Copy one tensor per live parameter into the rows of a contiguous stack."""
        if self._tile is not None and len(tensors) == len(self.params) and _alike(tensors, into):
            torch.stack(list(tensors), out=into.view(len(tensors), *self._tile))
        elif self._windows is not None:
            torch._foreach_copy_(self._views(into, live), list(tensors))
        else:
            rest = iter(tensors)
            for unit, span, on in zip(self.units, self.spans, live, strict=True):
                if on:
                    members = [next(rest) for _ in unit.tensors]
                    into[span].view(_grouped_shape(unit)).copy_(unit.join(members))

    def scatter(self, stack: Tensor, live: Sequence[bool]) -> list[Tensor]:
        """Split a contiguous stack of all rows into one tensor per live parameter."""
        if self._windows is not None:
            return self._views(stack, live)
        tensors = []
        for unit, span, on in zip(self.units, self.spans, live, strict=True):
            if on:
                grouped = stack[span].view(_grouped_shape(unit))
                tensors += unit.split(grouped)
        return tensors

    def _views(self, stack: Tensor, live: Sequence[bool]) -> list[Tensor]:
        assert self._windows is not None
        if self._tile is not None:
            views = list(stack.view(len(self.params), *self._tile).unbind())
            if all(live):
                return views
            return [view for view, on in zip(views, self.per_param(live), strict=True) if on]
        return [
            window.of(stack)
            for window, on in zip(self._windows, self.per_param(live), strict=True)
            if on
        ]


def are_live(units: Sequence[Unit]) -> list[bool]:
    """Return whether each unit takes part: its parameters require and have gradients."""
    return [all(p.requires_grad and p.grad is not None for p in unit.params) for unit in units]


def _alike(tensors: Sequence[Tensor], into: Tensor) -> bool:
    return {t.dtype for t in tensors} == {into.dtype}


def _grouped_shape(unit: Unit) -> tuple[int, ...]:
    return (unit.rows, *unit.shape) if unit.rule.stacked else tuple(unit.shape)
