"""The state of all owners as checkpoints hold it: in DTensors, whoever owns what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from structprecond.core.agreement import Agreement
from structprecond.core.boxes import Box, local
from structprecond.core.bucket import Bucket
from structprecond.core.exchange import Exchange
from structprecond.core.ownership import Share
from structprecond.core.ranks import Ranks
from structprecond.core.rounding import Rounding
from structprecond.core.state import ByParameter
from structprecond.core.transfer import Piece, Transfer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_WHAT = "the state of the optimizer"


@dataclass(frozen=True, eq=False)
class StateTensor:
    """A tensor of the state of one unit.

    Args:
        param: The parameter that the state is under.
        name: The name of the tensor.
        like: A tensor of its shape and dtype, which may be on the meta device.
        share: Who owns the unit, or each of its rows.
        sharded: Whether it has axes, besides that of the rows.
    """

    param: nn.Parameter
    name: str
    like: Tensor
    share: Share
    sharded: bool

    @classmethod
    def of(cls, exchange: Exchange, rounding: Rounding) -> Iterator[StateTensor]:
        """Yield the state of all units of an exchange, whoever owns them.

        Args:
            exchange: The exchange.
            rounding: How low-precision parameters are rounded.
        """
        first, units = exchange.shares[0].routed, [share.routed.unit for share in exchange.shares]
        key = replace(exchange.all_rows.key, device=torch.device("meta"))
        rules = [share.routed.route.rule for share in exchange.shares]
        bucket = Bucket(
            first.group, first.route.strategy, first.prefix, key, units, rules, rounding
        )
        for share, tensors in zip(exchange.shares, bucket.unit_tensors(), strict=True):
            unit = share.routed.unit
            for name, like in tensors.items():
                yield cls(unit.params[0], name, like, share, like.ndim > unit.rule.stacked)

    @property
    def device(self) -> torch.device:
        """Where its owner keeps it."""
        return local(self.param).device if self.like.is_meta else self.like.device

    @cached_property
    def rows(self) -> tuple[int, ...] | None:
        """The rows that this rank owns; None if the tensor has one owner."""
        mine = self.share.mine
        return (() if mine is None else mine.row_numbers or ()) if self.share.by_rows else None

    def empty(self, size: int) -> Tensor:
        """Return an uninitialized tensor of another length along the first axis."""
        shape = (size, *self.like.shape[1:])
        return torch.empty(shape, dtype=self.like.dtype, device=self.device)

    def parts(self) -> Iterator[tuple[int, int, int]]:
        """Yield the owners, each with the start and the end of a range of the first axis."""
        if self.share.by_rows:
            yield from ((owner, row, row + 1) for row, owner in enumerate(self.share.owners))
        else:
            yield self.share.owners[0], 0, self.like.shape[0]

    def in_owned(self, box: Box, owned: Tensor) -> Tensor:
        """Return the view of a box in what this rank owns."""
        start = box.offset[0] if self.rows is None else self.rows.index(box.offset[0])
        return owned.narrow(0, start, box.size[0])


class ShardedState:
    """The state of all owners, as a checkpoint has it.

    Tensors with axes are DTensors, sharded along the first axis over the owners: the rows of a
    stacked unit, or else the first axis of the tensor itself. Counters, and what else has a number
    for each row, are whole on all ranks.

    Args:
        agreement: The agreement of all ranks.
        ranks: The ranks that own the rows.
        tensors: The tensors, in the same order on all ranks.
    """

    def __init__(self, agreement: Agreement, ranks: Ranks, tensors: Iterable[StateTensor]) -> None:
        self._agreement, self._ranks, tensors = agreement, ranks, list(tensors)
        self._meshes: dict[str, DeviceMesh] = {}
        self._sharded = [one for one in tensors if one.sharded]
        self._numbers = [one for one in tensors if not one.sharded]

    def gather(self, state: ByParameter) -> ByParameter:
        """Return the whole state; all ranks have to call it.

        Args:
            state: The state of this rank's rows, and for each parameter what has no rows.
        """
        whole: dict[Any, dict[str, Tensor]] = {
            one.param: dict(state[one.param]) for one in [*self._sharded, *self._numbers]
        }
        whole |= {p: dict(entry) for p, entry in state.items() if p not in whole}
        for one in self._sharded:
            whole[one.param][one.name] = self._shard_of(one)
        self._move(whole, state, to_owners=False)
        self._gather_numbers(state, whole)
        return whole

    def scatter(self, whole: ByParameter, state: ByParameter) -> None:
        """Write the whole state into this rank's rows; all ranks have to call it."""
        self._move(whole, state, to_owners=True)
        for one in self._numbers:
            if one.share.mine is not None:
                source = whole[one.param][one.name]
                rows = source if one.rows is None else source[list(one.rows)]
                state[one.param][one.name].copy_(rows)

    def _shard_of(self, one: StateTensor) -> Tensor:
        # importing them takes long
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        kind = one.device.type
        if kind not in self._meshes:
            self._meshes[kind] = DeviceMesh.from_group(self._ranks.group, kind)
        mesh = self._meshes[kind]
        start, end = self._range(one, self._ranks.me)
        shape = one.like.shape
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            one.empty(end - start), mesh, (Shard(0),), run_check=False, shape=shape, stride=stride
        )

    def _range(self, one: StateTensor, rank: int) -> tuple[int, int]:
        """Return the start and the end of a rank's shard, as torch chunks the first axis."""
        length = one.like.shape[0]
        chunk = -(-length // self._ranks.size)
        return min(rank * chunk, length), min((rank + 1) * chunk, length)

    def _pieces(self, one: StateTensor) -> Iterator[tuple[int, int, Box]]:
        """Yield each owner, the rank that has a part in its shard, and the part."""
        rest = tuple(one.like.shape[1:])
        chunk = self._range(one, 0)[1] or 1
        for owner, start, end in one.parts():
            for rank in range(start // chunk, -(-end // chunk)):
                first, last = self._range(one, rank)
                first, last = max(first, start), min(last, end)
                yield owner, rank, Box((first, *[0] * len(rest)), (last - first, *rest))

    def _move(self, whole: ByParameter, state: ByParameter, to_owners: bool) -> None:
        """Move what is sharded between owners and shards, in one collective for each dtype."""
        shards = [local(whole[one.param][one.name]) for one in self._sharded]
        starts = [self._range(one, self._ranks.me)[0] for one in self._sharded]
        kinds: dict[tuple[torch.dtype, torch.device], list[Piece]] = {}
        for i, one in enumerate(self._sharded):
            kinds.setdefault((one.like.dtype, one.device), []).extend(
                Piece(*((rank, owner) if to_owners else (owner, rank)), box, i)
                for owner, rank, box in self._pieces(one)
            )

        def owned(piece: Piece) -> Tensor:
            one = self._sharded[piece.tensor]
            return one.in_owned(piece.box, state[one.param][one.name])

        def shard(piece: Piece) -> Tensor:
            start = piece.box.offset[0] - starts[piece.tensor]
            return shards[piece.tensor].narrow(0, start, piece.box.size[0])

        source, target = (shard, owned) if to_owners else (owned, shard)
        transfers = {kind: Transfer(self._ranks, pieces) for kind, pieces in kinds.items()}
        arrivals = [
            transfer.start([*map(source, transfer.outgoing)], *kind, _WHAT)
            for kind, transfer in transfers.items()
        ]
        for transfer, arrival in zip(transfers.values(), arrivals, strict=True):
            arrival.wait()
            arrival.write([*map(target, transfer.incoming)])

    def _gather_numbers(self, state: ByParameter, whole: dict[Any, dict[str, Tensor]]) -> None:
        """Share the numbers of all rows, which are few."""
        own = [
            (i, one.rows, state[one.param][one.name].tolist())
            for i, one in enumerate(self._numbers)
            if one.share.mine is not None
        ]
        for one in self._numbers:
            # torch wants all tensors with axes on one device
            device = local(one.param).device if one.like.ndim else one.device
            whole[one.param][one.name] = torch.empty(
                one.like.shape, dtype=one.like.dtype, device=device
            )
        for known in self._agreement.share(own, _WHAT):
            for i, rows, numbers in known:
                one = self._numbers[i]
                target = whole[one.param][one.name]
                values = torch.tensor(numbers, dtype=target.dtype, device=target.device)
                if rows is None:
                    target.copy_(values)
                else:
                    target[list(rows)] = values
