"""Sends pieces of tensors between ranks in one all-to-all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from structprecond.core.agreement import naming_ranks
from structprecond.core.boxes import Box
from structprecond.core.ranks import Ranks


class Piece(NamedTuple):
    """Entries that one rank sends to another.

    Args:
        source: The rank that sends them.
        target: The rank that receives them.
        box: Their place in the tensor that they belong to.
        tensor: Which tensor that is.
    """

    source: int
    target: int
    box: Box
    tensor: int


class Transfer:
    """The pieces that are sent in one all-to-all.

    Args:
        ranks: The ranks.
        pieces: All pieces, in the same order on every rank.

    Attributes:
        sent: The number of entries that each rank sends to others.
        received: The number of entries that each rank receives from others.
        outgoing: The pieces that this rank sends, first those that stay.
        incoming: The pieces that this rank receives, first those that stay.
    """

    def __init__(self, ranks: Ranks, pieces: Iterable[Piece]) -> None:
        self._ranks, me = ranks, ranks.me
        self.sent, self.received = [0] * ranks.size, [0] * ranks.size
        own: list[Piece] = []
        self._sent: list[Piece] = []
        self._received: list[Piece] = []
        for piece in pieces:
            source, target, size = piece.source, piece.target, piece.box.numel
            if source == target:
                if source == me:
                    own.append(piece)
                continue
            self.sent[source] += size
            self.received[target] += size
            if source == me:
                self._sent.append(piece)
            elif target == me:
                self._received.append(piece)
        self._sent.sort(key=lambda piece: piece.target)
        self._received.sort(key=lambda piece: piece.source)
        self.outgoing, self.incoming = own + self._sent, own + self._received
        self._stay = len(own)
        self._buffers: tuple[_Buffer, _Buffer] | None = None
        self._splits = [0] * ranks.size, [0] * ranks.size
        for piece in self._sent:
            self._splits[0][piece.target] += piece.box.numel
        for piece in self._received:
            self._splits[1][piece.source] += piece.box.numel

    @property
    def crosses(self) -> bool:
        """Whether anything is sent to another rank; if not, no rank calls the collective."""
        return any(self.sent)

    def start(
        self,
        sources: Sequence[Tensor | None],
        dtype: torch.dtype,
        device: torch.device,
        what: str,
    ) -> Arrival:
        """Start to send all pieces.

        Args:
            sources: The entries of each piece of `outgoing`; None for zeros.
            dtype: The dtype to send.
            device: The device.
            what: What is sent, for messages.
        """
        own = list(sources[: self._stay])
        if not self.crosses:
            return Arrival(own, None, self._ranks, what)
        if self._buffers is None:
            self._buffers = (
                _Buffer(self._sent, dtype, device),
                _Buffer(self._received, dtype, device),
            )
        sent, received = self._buffers
        sent.allocate()
        received.allocate()
        _copy(sent.views, sources[self._stay :])
        with naming_ranks(what, self._ranks):
            work = dist.all_to_all_single(
                received.flat,
                sent.flat,
                self._splits[1],
                self._splits[0],
                self._ranks.group,
                async_op=True,
            )
        return Arrival(own, work, self._ranks, what, sent, received)


class _Buffer:
    """One tensor for the entries of many pieces; has no memory between steps.

    Views stay valid when their memory is freed and allocated again, so they are made once.

    Args:
        pieces: The pieces, in their order in the buffer.
        dtype: The dtype.
        device: The device.
    """

    def __init__(self, pieces: Sequence[Piece], dtype: torch.dtype, device: torch.device) -> None:
        sizes = [piece.box.numel for piece in pieces]
        self.flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        parts = self.flat.split(sizes) if sizes else ()
        self.views = [part.view(p.box.size) for part, p in zip(parts, pieces, strict=True)]
        self.free()

    def allocate(self) -> None:
        """Get memory."""
        allocate(self.flat)

    def free(self) -> None:
        """Free the memory."""
        free(self.flat)


@dataclass
class Arrival:
    """A transfer under way.

    Args:
        own: The entries that stay on this rank; None for zeros.
        work: The collective; None if nothing crosses.
        ranks: The ranks.
        what: What is sent, for messages.
        sent: The buffer that is sent.
        received: The buffer that is received.
    """

    own: list[Tensor | None]
    work: dist.Work | None
    ranks: Ranks
    what: str
    sent: _Buffer | None = None
    received: _Buffer | None = None

    def wait(self) -> None:
        """Wait until everything has arrived.

        Raises:
            LostRankError: If it does not; names the ranks and what was sent.
        """
        if self.work is not None:
            with naming_ranks(self.what, self.ranks):
                self.work.wait()
        if self.sent is not None:
            self.sent.free()

    def write(self, targets: Sequence[Tensor]) -> None:
        """Write everything to its place.

        Args:
            targets: Where each piece of the transfer's `incoming` belongs.
        """
        arrived = [] if self.received is None else self.received.views
        _copy(targets, [*self.own, *arrived])

    def free(self) -> None:
        """Free what has arrived."""
        if self.received is not None:
            self.received.free()


def allocate(tensor: Tensor) -> None:
    """Give a tensor the memory that it needs."""
    tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())


def free(tensor: Tensor) -> None:
    """Free the memory of a tensor, and that of its views."""
    tensor.untyped_storage().resize_(0)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor | None]) -> None:
    """Copy sources into targets; None stands for zeros."""
    pairs = list(zip(targets, sources, strict=True))
    zeros = [target for target, source in pairs if source is None]
    if zeros:
        torch._foreach_zero_(zeros)
    known = [(target, source) for target, source in pairs if source is not None]
    if known:
        torch._foreach_copy_([target for target, _ in known], [source for _, source in known])
