"""Moves gradients and parameters between the ranks that hold them and those that own the rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structprecond.core.all_rows import AllRows
from structprecond.core.boxes import Box, is_dtensor, local
from structprecond.core.bucket import BucketKey, runs_other_code
from structprecond.core.holders import Holders
from structprecond.core.naming import enumerate_names
from structprecond.core.ownership import Share
from structprecond.core.ranks import Ranks
from structprecond.core.transfer import Arrival, Piece, Transfer, allocate, free
from structprecond.errors import GradientError, StructPrecondError


@dataclass(frozen=True, eq=False)
class Held:
    """A parameter of a unit, where ranks hold it, and what this rank updates of it.

    Args:
        param: The parameter.
        holders: The ranks that hold each part.
        mine: The box that this rank holds.
        parts: The owners, each with the box that it updates.
        copied: Whether owners update copies, and not the parameter itself.
        copy: The copy of what this rank updates; None for no copy.
        rows: The numbers of the rows in the copy; None if it is a copy of the whole parameter.
        row_length: How many indices along the first axis belong to one row.
    """

    param: nn.Parameter
    holders: Holders
    mine: Box
    parts: Sequence[tuple[int, Box]]
    copied: bool
    copy: nn.Parameter | None
    rows: tuple[int, ...] | None
    row_length: int

    @classmethod
    def of(cls, share: Share, ranks: Ranks) -> Iterator[Held]:
        """Yield the parameters of a unit."""
        unit, mine = share.routed.unit, share.mine
        copies = (None,) * len(unit.params) if mine is None else mine.copies
        rows = None if mine is None else mine.row_numbers
        for p, copy in zip(unit.params, copies or (None,) * len(unit.params), strict=True):
            holders, whole = ranks.holders(p), Box.whole(p.shape)
            length = p.shape[0] // len(share.owners) if share.by_rows else 0
            row = Box(whole.offset, (length, *whole.size[1:]))
            parts = [
                (owner, row.moved(0, i * length) if share.by_rows else whole)
                for i, owner in enumerate(share.owners)
            ]
            mine_of_p = holders.boxes[ranks.me]
            yield cls(p, holders, mine_of_p, parts, share.copied, copy, rows, length)

    def fits(self, part: Tensor) -> bool:
        """Return whether a tensor has the shape of this rank's part; empty parts may have any."""
        return part.shape == self.mine.size or part.numel() == self.mine.numel == 0

    def in_param(self, box: Box, tensor: Tensor) -> Tensor:
        """Return the view of a box in this rank's part of the parameter or of its gradient."""
        return box.of(tensor, self.mine)

    def in_copy(self, box: Box, tensor: Tensor) -> Tensor:
        """Return the view of a box in the copy or in its gradient."""
        if self.rows is None:
            return box.of(tensor, Box.whole(self.param.shape))
        row = box.offset[0] // self.row_length
        place = box.moved(0, (self.rows.index(row) - row) * self.row_length)
        shape = (len(self.rows) * self.row_length, *self.param.shape[1:])
        return place.of(tensor.view(shape), Box.whole(shape))

    def collected(self, ranks: Ranks) -> Iterator[tuple[int, int, Box]]:
        """Yield what owners collect: the rank that sends it, the owner, and the box."""
        for owner, part in self.parts if self.copied else ():
            for box, holders in self.holders.of(part):
                yield ranks.nearest(owner, holders), owner, box

    def spread(self) -> Iterator[tuple[int, int, Box]]:
        """Yield what owners spread: the owner, the rank that receives it, and the box."""
        for owner, part in self.parts:
            for box, holders in self.holders.of(part):
                for target in holders:
                    if self.copied or target != owner:
                        yield owner, target, box


class Exchange:
    """The exchange for the units of one bucket: in before the update, and out after it.

    Args:
        ranks: The ranks.
        shares: The units.
        key: What they have in common.

    Attributes:
        inward: Gradients and parameters that owners collect.
        outward: Updated parameters that owners spread.
        all_rows: The rows of all ranks, over which refreshes are staggered.
        runs_other_code: Whether a step calls code from outside the library.
    """

    def __init__(self, ranks: Ranks, shares: Sequence[Share], key: BucketKey) -> None:
        self.ranks, self.shares = ranks, list(shares)
        self.all_rows = AllRows(key, [(share.routed, share.mine) for share in shares])
        self.runs_other_code = runs_other_code(shares[0].routed.route.strategy, key)
        first = shares[0].routed.unit.params[0]
        self._dtype, self._device = first.dtype, local(first).device
        self._held = [held for share in shares for held in Held.of(share, ranks)]
        self._copies = [held.copy for held in self._held if held.copy is not None]
        # without memory between steps, so views of them are made once
        self._copy_grads = [torch.empty_like(copy) for copy in self._copies]
        # the gradient of a parameter is tensor 2i, the parameter itself 2i + 1
        self.inward = Transfer(
            ranks,
            (
                Piece(*piece, 2 * i + kind)
                for i, held in enumerate(self._held)
                for piece in held.collected(ranks)
                for kind in (0, 1)
            ),
        )
        self.outward = Transfer(
            ranks,
            (
                Piece(*piece, 2 * i + 1)
                for i, held in enumerate(self._held)
                for piece in held.spread()
            ),
        )
        self._into, self._from = self._views_of_copies()
        self._arrival: Arrival | None = None
        # what this rank holds in this step: its parts, and their gradients
        self._parts: list[Tensor] = []
        self._grads: list[Tensor | None] = []
        self.free()

    def _views_of_copies(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return where arriving pieces belong, and whence those to spread come.

        The latter are None where the owner updates the parameter itself.
        """
        for copy in self._copies:
            allocate(copy)
        grads = dict(zip(self._copies, self._copy_grads, strict=True))

        def view(piece: Piece) -> Tensor | None:
            held = self._held[piece.tensor // 2]
            if held.copy is None:
                return None
            tensor = held.copy.detach() if piece.tensor % 2 else grads[held.copy]
            return held.in_copy(piece.box, tensor)

        into = [t for t in map(view, self.inward.incoming) if t is not None]
        return into, [*map(view, self.outward.outgoing)]

    @property
    def name(self) -> str:
        """The names of the units, for messages."""
        return enumerate_names([share.routed.unit.label for share in self.shares])

    @property
    def entry_bytes(self) -> int:
        """The number of bytes of each entry that is sent."""
        return self._dtype.itemsize

    def regroup(self, groups: Mapping[int, dict[str, Any]]) -> None:
        """Use another param group, by the identity of the one before."""
        self.shares = [share.regrouped(groups) for share in self.shares]
        self.all_rows.first = self.shares[0].routed

    @property
    def fits(self) -> bool:
        """Whether this rank's parts have the shape, dtype and device that this was made for."""
        return all(self._has(held, local(held.param)) for held in self._held)

    def _has(self, held: Held, part: Tensor) -> bool:
        found = part.dtype, part.device
        return found == (self._dtype, self._device) and held.fits(part)

    def check(self, names: Mapping[nn.Parameter, str]) -> None:
        """Check that this rank's parts and their gradients are as they were at construction.

        Raises:
            StructPrecondError: If the shape, dtype or device of a part has changed.
            GradientError: If a gradient is sparse, complex, of another dtype, or placed otherwise.
        """
        if not self._parts:  # thawed in this step, so not collected yet
            self._read()
        for held, part, local_grad in zip(self._held, self._parts, self._grads, strict=True):
            p = held.param
            if not self._has(held, part):
                raise StructPrecondError(
                    f"This rank's part of {names[p]} is {part.dtype} of shape {tuple(part.shape)} "
                    f"on {part.device}, expected {self._dtype} of shape {held.mine.size} on "
                    f"{self._device}. Build a new optimizer."
                )
            grad = p.grad
            if grad is None or local_grad is None:
                continue
            if grad.is_floating_point() and grad.dtype != self._dtype:
                raise GradientError(
                    f"The gradient of {names[p]} is {grad.dtype}, expected {self._dtype} as the "
                    "parameter, since sending it would round it. Leave grad_dtype alone, or keep "
                    "the parameter in the precision of its gradient."
                )
            placed = not is_dtensor(p) or (is_dtensor(grad) and grad.placements == p.placements)
            if not placed or grad.shape != p.shape:
                raise GradientError(
                    f"The gradient of {names[p]} is {type(grad).__name__} of shape "
                    f"{tuple(grad.shape)} with placements {getattr(grad, 'placements', 'none')}, "
                    f"expected those of the parameter, {tuple(p.shape)} with "
                    f"{getattr(p, 'placements', 'none')}. Redistribute it."
                )
            if not _is_dense(local_grad):
                raise GradientError(
                    f"The gradient of {names[p]} has {grad.dtype} and the layout {grad.layout}, "
                    "expected real numbers in a dense layout."
                )

    def _read(self) -> None:
        """Note what this rank holds."""
        self._parts = [local(held.param) for held in self._held]
        self._grads = [
            None if (grad := held.param.grad) is None else local(grad) for held in self._held
        ]

    def collect(self) -> None:
        """Start to send gradients and parameters to the owners; zeros for what `check` refuses."""
        self._read()

        def source(piece: Piece) -> Tensor | None:
            i, is_param = divmod(piece.tensor, 2)
            held, tensor = self._held[i], (self._parts if is_param else self._grads)[i]
            if tensor is None or not held.fits(tensor) or tensor.device != self._device:
                return None
            return held.in_param(piece.box, tensor) if _is_dense(tensor) else None

        sources = [*map(source, self.inward.outgoing)]
        what = f"the gradients of {self.name}"
        self._arrival = self.inward.start(sources, self._dtype, self._device, what)

    def allocate(self) -> None:
        """Allocate the copies and their gradients, while all ranks still raise together."""
        for copy, grad in zip(self._copies, self._copy_grads, strict=True):
            allocate(copy)
            allocate(grad)
            copy.grad = grad

    def arrive(self) -> None:
        """Write what has arrived into the copies and their gradients; once more does nothing."""
        arrival = self._arrival
        if arrival is None:
            return
        arrival.wait()
        arrival.write(self._into)
        self._arrival = None  # not before: an interrupted rank goes on here
        arrival.free()

    def spread(self) -> None:
        """Start to send updated parameters to the ranks that hold them."""
        sources = [
            self._in_part(piece) if view is None else view
            for piece, view in zip(self.outward.outgoing, self._from, strict=True)
        ]
        what = f"the parameters of {self.name}"
        self._arrival = self.outward.start(sources, self._dtype, self._device, what)

    def _in_part(self, piece: Piece) -> Tensor:
        """Return the view of a piece in this rank's part of its parameter."""
        i = piece.tensor // 2
        return self._held[i].in_param(piece.box, self._parts[i])

    def finish(self) -> None:
        """Write the updated parameters that have arrived, and free the copies."""
        arrival = self._arrival
        if arrival is None:
            return
        arrival.wait()
        arrival.write([*map(self._in_part, self.outward.incoming)])
        self.free()

    def drop(self) -> None:
        """Wait for what is under way without writing it, and free the copies."""
        if self._arrival is not None:
            self._arrival.wait()
        self.free()

    def free(self) -> None:
        """Forget what is under way, and free the copies and their gradients."""
        if self._arrival is not None:
            self._arrival.free()
        self._arrival = None
        for copy, grad in zip(self._copies, self._copy_grads, strict=True):
            copy.grad = None
            free(copy)
            free(grad)
        self._parts, self._grads = [], []


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.is_floating_point()
