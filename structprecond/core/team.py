"""Teams: how the processes that train one model make a step together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from structprecond.core.agreement import NOTHING, Agreement, Facts
from structprecond.core.batch_size import Samples
from structprecond.core.boxes import is_dtensor
from structprecond.core.bucket import Bucket
from structprecond.core.build import RoutedUnit, make_buckets
from structprecond.core.finite import exclude_unusable, with_large_gradient
from structprecond.core.inspection import check_step
from structprecond.core.options import Nonfinite
from structprecond.core.refresh import RefreshSchedule, Stack
from structprecond.core.rounding import Rounding
from structprecond.core.seed import Seed
from structprecond.core.state import ByParameter
from structprecond.core.step import Plan
from structprecond.core.units import Unit
from structprecond.errors import StructPrecondError

T = TypeVar("T")
WITHOUT, INTERVALS = "the units without a gradient", "the refresh intervals"
"""Names of facts."""


class Alone:
    """One process, which holds everything and decides alone."""

    @property
    def speaks(self) -> bool:
        """Whether this process prints what is the same on all ranks."""
        return True

    def problem_with(self, params: Iterable[nn.Parameter]) -> str | None:
        """Return why the team cannot train some parameters, as an object; None if it can."""
        sharded = [p for p in params if is_dtensor(p)]
        if not sharded:
            return None
        return (
            f"a DTensor of shape {tuple(sharded[0].shape)}, but the others are whole on every rank"
        )

    def can_follow(self, new: Mapping[nn.Parameter, nn.Parameter]) -> bool:
        """Return whether the state can stay where it is.

        Args:
            new: The parameters that stay, and for each the one that is updated from now on.
        """
        return self.problem_with(new.values()) is None

    def regroup(self, groups: Mapping[int, dict[str, Any]]) -> None:
        """Use other param groups from now on.

        Args:
            groups: By the identity of a group that was used, the one that replaces it.
        """

    @property
    def has_met(self) -> bool:
        """Whether the ranks have met."""
        return True

    def meet(self, parameters: Callable[[], Facts], buckets: Sequence[Bucket]) -> None:
        """Check before the first step that all ranks train the same parameters; share the seed.

        Args:
            parameters: Returns the parameters.
            buckets: All buckets. Rows that have no seed get one, also after loading a checkpoint
                that ranks have saved before they met.
        """
        Seed(common=torch.initial_seed()).give_to(buckets)

    def make_buckets(self, units: Iterable[RoutedUnit], rounding: Rounding) -> list[Bucket]:
        """Stack the units that this rank owns, which allocates their state."""
        buckets = make_buckets(units, rounding)
        Seed(common=torch.initial_seed()).give_to(buckets)
        return buckets

    def adopt(self) -> list[tuple[Unit, dict[str, Tensor]]]:
        """Use the last buckets that were made, since nothing has failed after that.

        Returns:
            Units that are in no bucket, with what this rank shows of their state.
        """
        return []

    def give_up(self) -> None:
        """Undo the last `adopt`."""

    def check(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        buckets: Sequence[Bucket],
        names: Mapping[nn.Parameter, str],
    ) -> list[list[bool]]:
        """Check the inputs of a step; return the live units of each bucket."""
        return check_step(param_groups, buckets, names)

    def stacks(self, buckets: Sequence[Bucket]) -> Sequence[Stack]:
        """Return the stacks over whose rows refreshes are staggered."""
        return buckets

    def intervals(
        self, schedule: RefreshSchedule, buckets: Sequence[Bucket], global_step: int
    ) -> list[int | bool]:
        """Return the refresh interval of each bucket, or whether to refresh it now."""
        return schedule.intervals(buckets, global_step)

    @contextmanager
    def step(self, buckets: Sequence[Bucket]) -> Iterator[None]:
        """Bring gradients to the owners before a step, and parameters back to the others after."""
        yield

    def agree(
        self,
        plan: Callable[[], list[Plan]],
        facts: Callable[[], Facts],
        samples: Samples,
        schedule: RefreshSchedule,
        nonfinite: Nonfinite,
    ) -> list[Plan]:
        """Plan a step on all ranks, or on none.

        Args:
            plan: Plans it on this rank.
            facts: Returns what has to be the same on all ranks, besides what the team knows.
            samples: The number of samples behind the gradients.
            schedule: Assigns phase offsets.
            nonfinite: What to do with unusable gradients.
        """
        plans = plan()
        schedule.stagger([one.bucket for one in plans], [one.every for one in plans])
        return plans

    def arrive(self, buckets: Sequence[Bucket]) -> None:
        """Wait for the gradients."""

    def exclude(self, plans: Sequence[Plan], refuse: bool) -> str | None:
        """Exclude unusable units on all ranks; see `exclude_unusable`."""
        return exclude_unusable(plans, refuse)

    def confirm(self, make: Callable[[], T], plans: Sequence[Plan], may_fail: bool) -> T:
        """Do something on all ranks, or on none.

        Args:
            make: Does it.
            plans: The plans.
            may_fail: Whether it may fail on single ranks, even without code of the user's own.
        """
        return make()

    def moved(self, bucket: Bucket) -> None:
        """Note that the parameters of a bucket have been updated."""

    def decide(self, make: Callable[[], tuple[T, Facts]], verb: str) -> T:
        """Prepare to save or to load a checkpoint on all ranks, or on none.

        Args:
            make: Returns the preparations, and what has to be the same on all ranks.
            verb: What is about to happen to the checkpoint, for messages.
        """
        return make()[0]

    def gather(self, state: ByParameter) -> ByParameter:
        """Return the state of all ranks, for a checkpoint."""
        return state

    def scatter(self, whole: ByParameter, state: ByParameter) -> None:
        """Write the state of all ranks, which `gather` returned, into this rank's."""


class Replicas(Alone):
    """Ranks with the same parameters, gradients and state, as under DistributedDataParallel.

    Args:
        agreement: The agreement of all ranks.
        share: The number of different batches over the number of ranks; None if it is unknown.
        seed: The seed of all random numbers, which the first step shares: no rank waits for others
            while an optimizer is built.
    """

    def __init__(self, agreement: Agreement, share: float | None, seed: Seed) -> None:
        self.agreement, self._share, self.seed = agreement, share, seed

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return itself: copies of the optimizer on these ranks decide together as well."""
        return self

    def __reduce__(self) -> Any:
        """Return one process: another process that loads a pickle has no such ranks."""
        return Alone, ()

    @property
    def speaks(self) -> bool:
        """Whether this is the first rank."""
        return self.agreement.ranks.me == 0

    @property
    def has_met(self) -> bool:
        """Whether the ranks have met, so that this one knows the common seed."""
        return self.seed.common is not None

    def meet(self, parameters: Callable[[], Facts], buckets: Sequence[Bucket]) -> None:
        """Check before the first step that all ranks train the same parameters; share the seed."""
        own = self._own_seed
        _, numbers = self.agreement.reach(lambda: (None, parameters(), own))
        self._learn_seed(numbers, buckets)

    @property
    def _own_seed(self) -> tuple[int, int]:
        """This rank's summand of the common seed, in two numbers, since a seed may take 64 bits."""
        return divmod(self.seed.own, 2**32) if self.speaks else NOTHING

    def _learn_seed(self, numbers: tuple[int, int], buckets: Iterable[Bucket]) -> None:
        """Note the common seed, given the sum over ranks, and give it to buckets without one."""
        if self.seed.common is None:
            self.seed.common = numbers[0] * 2**32 + numbers[1]
        self.seed.give_to(buckets)

    def make_buckets(self, units: Iterable[RoutedUnit], rounding: Rounding) -> list[Bucket]:
        """Stack the units that this rank owns, with the same seeds on all ranks."""
        buckets = make_buckets(units, rounding)
        self.seed.give_to(buckets)
        return buckets

    def agree(
        self,
        plan: Callable[[], list[Plan]],
        facts: Callable[[], Facts],
        samples: Samples,
        schedule: RefreshSchedule,
        nonfinite: Nonfinite,
    ) -> list[Plan]:
        """Plan a step on all ranks, or on none; counted samples are those of all ranks."""

        def make() -> tuple[list[Plan], Facts, tuple[int, int]]:
            plans = plan()
            fixed = None if samples.counts else samples.count
            known = {**facts(), "the fixed batch size": fixed, **self._facts(plans)}
            suspects = self._suspects(plans) if nonfinite != "ignore" else 0
            if samples.counts and self._share is None:
                raise StructPrecondError(
                    "The batch size cannot be counted, since the parameters are DTensors, but no "
                    "module of the model is under fully_shard, which knows the ranks that see the "
                    "same batch. Pass batch_size= as an integer, the samples of all ranks."
                )
            return plans, known, (samples.count or 0, suspects)

        plans, (total, self._doubts) = self.agreement.reach(make)
        # 0 if nothing is counted, or if ranks may share a batch
        total = round(total * (self._share or 0)) if samples.counts else 0
        samples.note_total(total or None)
        if total:
            for one in plans:
                one.batch_size = total
        self._settle(plans, schedule)
        return plans

    def _facts(self, plans: Sequence[Plan]) -> Facts:
        """Return what else has to be the same on all ranks."""
        return {WITHOUT: left_out(plans), INTERVALS: [one.every for one in plans]}

    def _settle(self, plans: Sequence[Plan], schedule: RefreshSchedule) -> None:
        """Do what comes once all ranks have agreed to make a step."""
        schedule.stagger([one.bucket for one in plans], [one.every for one in plans])

    def _suspects(self, plans: Sequence[Plan]) -> int:
        """Return the number of parameters whose gradients may be unusable on this rank alone."""
        return len(with_large_gradient(plans))

    def exclude(self, plans: Sequence[Plan], refuse: bool) -> str | None:
        """Exclude on all ranks what is unusable on one, such as after a local fault."""
        if not self._doubts:
            return None
        exclude = partial(super().exclude, plans, refuse)
        own, _ = self.agreement.reach(lambda: (exclude(), {}, NOTHING))
        found = self.agreement.share((own, [plan.live for plan in plans]), "the units to skip")
        for _, lives in found:
            for plan, live in zip(plans, lives, strict=True):
                plan.exclude([not on for on in live])
        return next((message for message, _ in found if message is not None), None)

    def confirm(self, make: Callable[[], T], plans: Sequence[Plan], may_fail: bool) -> T:
        """Do something on all ranks, or on none."""
        if not (may_fail or self._runs_other_code(plans)):
            return make()
        return self.agreement.reach(lambda: (make(), {}, NOTHING))[0]

    def _runs_other_code(self, plans: Sequence[Plan]) -> bool:
        return any(one.bucket.runs_other_code for one in plans)


def left_out(plans: Sequence[Plan]) -> list[str]:
    """Return the names of the units that take no part in a step."""
    return [
        unit.label
        for plan in plans
        for unit, on in zip(plan.bucket.units, plan.live, strict=True)
        if not on
    ]
