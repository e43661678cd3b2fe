"""A team that shares the work: each row has an owner, and every rank holds its part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any, Self

from torch import Tensor, nn

from structprecond.core.agreement import Agreement, Facts, digest_of
from structprecond.core.all_rows import AllRows
from structprecond.core.bucket import Bucket
from structprecond.core.build import RoutedUnit
from structprecond.core.exchange import Exchange
from structprecond.core.finite import count_suspects, exclude_unusable
from structprecond.core.inspection import check_values
from structprecond.core.layout import are_live
from structprecond.core.ownership import Loads, Share, assign, bytes_of_row, items_of
from structprecond.core.ranks import Ranks
from structprecond.core.refresh import RefreshSchedule, Stack
from structprecond.core.rounding import Rounding
from structprecond.core.seed import Seed
from structprecond.core.sharded_state import ShardedState, StateTensor
from structprecond.core.state import ByParameter
from structprecond.core.step import Plan
from structprecond.core.team import INTERVALS, WITHOUT, Replicas, T, left_out
from structprecond.core.traffic import Traffic
from structprecond.core.units import Unit
from structprecond.errors import LostRankError, StructPrecondError

OWNED = "what has owners (were parameters thawed, added or configured on some ranks only?)"
"""Name of a fact."""


class Owners(Replicas):
    """Ranks that hold parts of parameters, or all of them, and own some rows each.

    Args:
        agreement: The agreement of all ranks.
        share: The number of different batches over the number of ranks; None if it is unknown.
        seed: The seed of all random numbers, as for `Replicas`.
        ranks: The ranks that hold whole parameters together.

    Attributes:
        exchanges: The exchanges, in the order in which all ranks make them.
        loads: The loads of the owners.
        shares_skips: Whether ranks tell each other which units they skip: other ranks own rows of
            these units, or a replica of them.
    """

    def __init__(self, agreement: Agreement, share: float | None, seed: Seed, ranks: Ranks) -> None:
        super().__init__(agreement, share, seed)
        self.ranks, self.exchanges = ranks, list[Exchange]()
        self.loads = self._made_loads = Loads.none(ranks.size)
        self._made: list[tuple[Exchange, list[Bucket]]] = []
        self._before = 0, self.loads
        self._look()
        self._exchange_of: dict[Bucket, int] = {}
        self._intervals: list[int | bool] = []
        self._rounding: Rounding = "nearest"
        self._traffic = Traffic(self.exchanges)

    def problem_with(self, params: Iterable[nn.Parameter]) -> str | None:
        """Return why the team cannot train some parameters, as an object; None if it can."""
        return self.ranks.problem_with(params)

    def can_follow(self, new: Mapping[nn.Parameter, nn.Parameter]) -> bool:
        """Return whether the state can stay where it is: exchanges are made for parameters."""
        owned = [p for routed in self.units for p in routed.unit.params]
        same = all(new.get(p) is p for p in owned) and super().can_follow(new)
        return same and all(exchange.fits for exchange in self.exchanges)

    def regroup(self, groups: Mapping[int, dict[str, Any]]) -> None:
        """Use other param groups from now on."""
        for exchange in self.exchanges:
            exchange.regroup(groups)

    def make_buckets(self, units: Iterable[RoutedUnit], rounding: Rounding) -> list[Bucket]:
        """Assign owners, and stack what this rank owns."""
        alike: dict[Any, list[RoutedUnit]] = {}
        for routed in units:
            key = (id(routed.group), routed.route.strategy, routed.key())
            alike.setdefault(key, []).append(routed)
        items = []
        for (_, _, key), stack in alike.items():
            row_bytes = bytes_of_row(stack[0], key, rounding)
            items += [items_of(routed, key, row_bytes) for routed in stack]
        self._made, self._made_loads = [], deepcopy(self.loads)
        owners = iter(assign([item for some in items for item in some], self._made_loads))
        counts = iter(map(len, items))
        made, self._rounding = [], rounding
        for (_, _, key), stack in alike.items():
            shares = [
                Share.of(routed, [next(owners) for _ in range(next(counts))], self.ranks.me)
                for routed in stack
            ]
            mine = [replace(s.routed, unit=s.mine) for s in shares if s.mine is not None]
            buckets = super().make_buckets(mine, rounding)
            self._made.append((Exchange(self.ranks, shares, key), buckets))
            made += buckets
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Raise `StructPrecondError`: other ranks have the rest of the state."""
        raise StructPrecondError(
            "An optimizer whose rows have owners cannot be copied or pickled, since other ranks "
            "hold the rest of its state. Save what state_dict() returns on all ranks."
        )

    def __reduce__(self) -> Any:
        """Raise `StructPrecondError`, as for copies."""
        self.__deepcopy__({})

    def adopt(self) -> list[tuple[Unit, dict[str, Tensor]]]:
        """Use the last buckets that were made, since nothing has failed after that."""
        self._before = len(self.exchanges), self.loads
        made, self._made, self.loads = self._made, [], self._made_loads
        for number, (_, buckets) in enumerate(made, len(self.exchanges)):
            self._exchange_of |= dict.fromkeys(buckets, number)
        new = [exchange for exchange, _ in made]
        self.exchanges += new
        self._look()
        elsewhere: dict[Unit, dict[str, Tensor]] = {}
        for one in self._tensors_of(new):
            if one.share.mine is None:
                elsewhere.setdefault(one.share.routed.unit, {})[one.name] = one.empty(0)
        return list(elsewhere.items())

    def give_up(self) -> None:
        """Undo the last `adopt`."""
        number, self.loads = self._before
        del self.exchanges[number:]
        self._exchange_of = {b: i for b, i in self._exchange_of.items() if i < number}
        self._look()

    def _look(self) -> None:
        """Note what follows from the exchanges."""
        shares = [share for exchange in self.exchanges for share in exchange.shares]
        replicated = self.agreement.ranks.size > self.ranks.size
        self.shares_skips = replicated or any(share.by_rows for share in shares)
        owners = [(share.routed.unit.label, share.owners) for share in shares]
        self._owned = {
            "stacks": len(self.exchanges),
            "state in bytes": self.loads.state_bytes,
            "a digest of the owners": digest_of(owners),
        }

    @property
    def units(self) -> list[RoutedUnit]:
        """All units that have owners."""
        return [share.routed for exchange in self.exchanges for share in exchange.shares]

    def check(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        buckets: Sequence[Bucket],
        names: Mapping[nn.Parameter, str],
    ) -> list[list[bool]]:
        """Check hyperparameters and this rank's parts; return the live units of each bucket.

        Allocates the copies, so that a lack of memory lets all ranks raise.
        """
        for group in param_groups:
            check_values(group)
        for exchange in self.exchanges:
            exchange.check(names)
        for exchange in self.exchanges:
            exchange.allocate()
        return [are_live(bucket.units) for bucket in buckets]

    def stacks(self, buckets: Sequence[Bucket]) -> Sequence[Stack]:
        """Return the stacks over whose rows refreshes are staggered: those of all ranks."""
        return self._all_rows

    @property
    def _all_rows(self) -> list[AllRows]:
        return [exchange.all_rows for exchange in self.exchanges]

    def intervals(
        self, schedule: RefreshSchedule, buckets: Sequence[Bucket], global_step: int
    ) -> list[int | bool]:
        """Return the refresh interval of each bucket, or whether to refresh it now."""
        self._intervals = schedule.intervals(self._all_rows, global_step)
        return [self._intervals[self._exchange_of[bucket]] for bucket in buckets]

    def _facts(self, plans: Sequence[Plan]) -> Facts:
        """Return what else has to be the same on all ranks."""
        units = [routed.unit for routed in self.units]
        dead = [unit.label for unit, on in zip(units, are_live(units), strict=True) if not on]
        return {OWNED: self._owned, WITHOUT: dead, INTERVALS: self._intervals}

    def _settle(self, plans: Sequence[Plan], schedule: RefreshSchedule) -> None:
        """Do what comes once all ranks have agreed to make a step."""
        self._traffic.agreed = True
        stacks = self._all_rows
        if not schedule.moved(stacks, self._intervals):
            return
        mine = [(self._exchange_of[plan.bucket], plan.bucket) for plan in plans]
        own = [(number, stacks[number].known(bucket)) for number, bucket in mine]
        for known in self.agreement.share(own, "the phase offsets"):
            for number, rows in known:
                stacks[number].learn(rows)
        schedule.stagger(stacks, self._intervals)
        for number, bucket in mine:
            bucket.counters.phase_offset.copy_(stacks[number].offsets_of(bucket))

    def exclude(self, plans: Sequence[Plan], refuse: bool) -> str | None:
        """Exclude on all ranks the units that are unusable on one that owns rows of them."""
        if not self.shares_skips:
            return exclude_unusable(plans, refuse)
        if not self._doubts:
            return None

        def make() -> tuple[tuple[str | None, list[str]], Facts, tuple[int, int]]:
            message = exclude_unusable(plans, refuse)
            # units without a gradient are among them, the same on all ranks
            units = left_out(plans) if message is not None else []
            return (message, units), {}, (len(units), 0)

        self._traffic.agreed = False
        (message, own), (count, _) = self.agreement.reach(make)
        if count:
            skipped = set().union(*self.agreement.share(own, "the units to skip"))
            for plan in plans:
                plan.exclude([unit.label in skipped for unit in plan.bucket.units])
        return message

    def _suspects(self, plans: Sequence[Plan]) -> int:
        """Return the number of parts on this rank that may make a gradient unusable.

        Without ranks to tell, owners look at whole gradients, once these have arrived.
        """
        if not self.shares_skips:
            return 0
        units = [routed.unit for routed in self.units]
        most = max((len(unit.params) for unit in units), default=1)
        params = [p for unit in units for p in unit.params]
        return count_suspects(params, most * self.ranks.size)

    def _runs_other_code(self, plans: Sequence[Plan]) -> bool:
        return any(exchange.runs_other_code for exchange in self.exchanges)

    @contextmanager
    def step(self, buckets: Sequence[Bucket]) -> Iterator[None]:
        """Bring gradients to the owners before a step, and parameters back to the others after."""
        try:
            self._traffic.begin()
            yield
            self._traffic.finish()
        except LostRankError:
            self._traffic.abandon()
            raise
        except BaseException:
            self._traffic.fail()
            raise

    def arrive(self, buckets: Sequence[Bucket]) -> None:
        """Wait for the gradients."""
        for bucket in buckets:
            self._traffic.await_update(self._exchange_of[bucket], bucket)
        self._traffic.arrive()

    def confirm(self, make: Callable[[], T], plans: Sequence[Plan], may_fail: bool) -> T:
        """Do something on all ranks, or on none."""
        self._traffic.agreed = not (may_fail or self._runs_other_code(plans))
        result = super().confirm(make, plans, may_fail)
        self._traffic.agreed = True
        return result

    def moved(self, bucket: Bucket) -> None:
        """Note that the parameters of a bucket have been updated; send them if all are."""
        self._traffic.moved(self._exchange_of[bucket], bucket)

    def decide(self, make: Callable[[], tuple[T, Facts]], verb: str) -> T:
        """Prepare to save or to load a checkpoint on all ranks, or on none."""
        own = self._own_seed
        result, numbers = self.agreement.reach(lambda: (*make(), own), "checkpoint", verb)
        self._learn_seed(numbers, self._exchange_of)
        return result

    def gather(self, state: ByParameter) -> ByParameter:
        """Return the state of all ranks, for a checkpoint."""
        return self._sharded().gather(state)

    def scatter(self, whole: ByParameter, state: ByParameter) -> None:
        """Write the state of all ranks, which `gather` returned, into this rank's."""
        self._sharded().scatter(whole, state)

    def _sharded(self) -> ShardedState:
        return ShardedState(self.agreement, self.ranks, self._tensors_of(self.exchanges))

    def _tensors_of(self, exchanges: Sequence[Exchange]) -> Iterator[StateTensor]:
        for exchange in exchanges:
            yield from StateTensor.of(exchange, self._rounding)
