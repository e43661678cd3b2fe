"""Sends pieces of tensors between ranks in one all-to-all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    """

    def __init__(self, ranks: Ranks, pieces: Iterable[Piece]) -> None:
        self._ranks, me = ranks, ranks.me
        self.sent, self.received = [0] * ranks.size, [0] * ranks.size
        self._own: list[Piece] = []
        self._sent: list[Piece] = []
        self._received: list[Piece] = []
        for piece in pieces:
            source, target, size = piece.source, piece.target, piece.box.numel
            if source == target:
                if source == me:
                    self._own.append(piece)
                continue
            self.sent[source] += size
            self.received[target] += size
            if source == me:
                self._sent.append(piece)
            elif target == me:
                self._received.append(piece)
        self._sent.sort(key=lambda piece: piece.target)
        self._received.sort(key=lambda piece: piece.source)
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
        source: Callable[[Piece], Tensor | None],
        dtype: torch.dtype,
        device: torch.device,
        what: str,
    ) -> Arrival:
        """Start to send all pieces.

        Args:
            source: Returns what to send; None for zeros.
            dtype: The dtype to send.
            device: The device.
            what: What is sent, for messages.
        """
        own = [(piece, source(piece)) for piece in self._own]
        if not self.crosses:
            return Arrival(own, [], None, self._ranks, what)
        made: Any = {"dtype": dtype, "device": device}
        buffer = torch.empty(sum(self._splits[0]), **made)
        arrived = torch.empty(sum(self._splits[1]), **made)
        _copy(zip(_views(buffer, self._sent), map(source, self._sent), strict=True))
        with naming_ranks(what, self._ranks):
            work = dist.all_to_all_single(
                arrived, buffer, self._splits[1], self._splits[0], self._ranks.group, async_op=True
            )
        views = list(zip(self._received, _views(arrived, self._received), strict=True))
        return Arrival(own, views, work, self._ranks, what, buffer)


@dataclass
class Arrival:
    """A transfer under way.

    Args:
        own: The pieces that stay on this rank, with their entries; None for zeros.
        received: The pieces from other ranks, with their entries.
        work: The collective; None if nothing crosses.
        ranks: The ranks.
        what: What is sent, for messages.
        buffer: What is sent; kept until it has arrived.
    """

    own: list[tuple[Piece, Tensor | None]]
    received: Sequence[tuple[Piece, Tensor]]
    work: dist.Work | None
    ranks: Ranks
    what: str
    buffer: Tensor | None = None

    def wait(self) -> None:
        """Wait until everything has arrived.

        Raises:
            LostRankError: If it does not; names the ranks and what was sent.
        """
        if self.work is not None:
            with naming_ranks(self.what, self.ranks):
                self.work.wait()
        self.buffer = None

    def write(self, target: Callable[[Piece], Tensor]) -> None:
        """Write everything to its place."""
        pairs = [*self.own, *self.received]
        _copy((target(piece), entries) for piece, entries in pairs)


def _views(buffer: Tensor, pieces: Sequence[Piece]) -> Iterator[Tensor]:
    parts = buffer.split([piece.box.numel for piece in pieces]) if pieces else ()
    return (part.view(piece.box.size) for part, piece in zip(parts, pieces, strict=True))


def _copy(pairs: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    """Copy sources into targets; None stands for zeros."""
    targets, sources = [], []
    for target, source in pairs:
        if source is None:
            target.zero_()
        else:
            targets.append(target)
            sources.append(source)
    if targets:
        torch._foreach_copy_(targets, sources)
