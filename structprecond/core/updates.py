"""The updates of a step, as a whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from structprecond.core.bucket import Bucket
from structprecond.core.options import Nonfinite
from structprecond.core.state import State
from structprecond.core.step import Plan

Exclude = Callable[[Sequence[Plan], bool], str | None]
"""As `exclude_unusable`."""


class Updates:
    """The updates of all buckets in a step.

    Code from outside the library may fail: in strategies, hooks and structures of the user's own.
    Their buckets come first: their states are copied and updated, one after the other, before any
    parameter is written. The library's own buckets need no copy, and follow when nothing can fail
    any more.

    Args:
        plans: The plans of all buckets.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._plans = plans
        self._others = [plan for plan in plans if plan.bucket.runs_other_code]
        self._own = [plan for plan in plans if not plan.bucket.runs_other_code]
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._writes: list[Callable[[], list[str]]] = []
        if self._others:
            for plan in plans:
                self._keep(plan.bucket.counters)

    def _keep(self, state: State) -> None:
        self._kept.extend((t, t.clone()) for t in state.named_tensors().values())

    def prepare(
        self, nonfinite: Nonfinite, note: Callable[[str | None], None], exclude: Exclude
    ) -> None:
        """Exclude unusable units, and update the state of buckets that run other code.

        Args:
            nonfinite: What to do with unusable gradients.
            note: Takes the message about excluded units; None if there are none.
            exclude: Excludes them from plans, or refuses them; returns a message.
        """
        if nonfinite != "ignore":
            note(exclude(self._plans, nonfinite == "raise"))
        for plan in self._others:
            self._keep(plan.bucket.state)
            self._kept.extend((t, t.clone()) for t in plan.bucket.policy_numbers.values())
            self._writes.append(plan.prepare())

    def apply(self, moved: Callable[[Bucket], None]) -> list[str]:
        """Write the prepared updates, and make the others; return the units with failed refreshes.

        Args:
            moved: Called for each bucket whose parameters are written.
        """
        self._kept.clear()
        failed = []
        for plan, write in zip(self._others, self._writes, strict=True):
            failed += write()
            moved(plan.bucket)
        for plan in self._own:
            failed += plan.apply()
            moved(plan.bucket)
        return failed

    def undo(self) -> None:
        """Undo what was changed before `apply`."""
        for tensor, old in self._kept:
            tensor.copy_(old)


@contextmanager
def all_or_nothing(plans: Sequence[Plan]) -> Iterator[Updates]:
    """Undo what a step has changed if code from outside the library makes it fail."""
    updates = Updates(plans)
    try:
        yield updates
    except BaseException:
        updates.undo()
        raise
