"""Checkpoints of an optimizer in torch's layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from structprecond.core import checkpoint
from structprecond.core.agreement import Facts
from structprecond.core.assembly import Assembly
from structprecond.core.batch_size import Samples
from structprecond.core.build import RoutedUnit
from structprecond.core.entry import Entries
from structprecond.core.refresh import RefreshSchedule

_T = TypeVar("_T")


class Resumable(Optimizer):
    """The part of the optimizer that saves and loads checkpoints."""

    _global_step: Tensor
    _assembly: Assembly
    _samples: Samples
    _schedule: RefreshSchedule
    _entries: Entries
    _follow: Callable[..., None]
    _thaw: Callable[[Callable[[RoutedUnit], bool]], None]

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's layout: only copied tensors and plain values.

        The state of a unit is under its first parameter. Callables, strategies, groupings and
        structures are described, not saved.

        Where rows have owners, all ranks have to call it. Tensors with axes are then DTensors, each
        sharded along its first axis, or along the rows of a stacked unit. So
        `torch.distributed.checkpoint` saves and loads them for any number of ranks.

        Raises:
            DistributedError: If another rank cannot do the same.
        """
        self._follow(quiet=True)  # after this, the team is that of all ranks
        team = self._assembly.team
        groups = team.decide(self._prepare_to_save, "save")
        saved = checkpoint.save(groups, team.gather(self.state))
        return _hooked(self, "state_dict_post", saved)

    def _prepare_to_save(self) -> tuple[Sequence[dict[str, Any]], Facts]:
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._follow()
        facts = {"the number of steps": int(self._global_step)}
        return self._assembly.follower.used_groups(), facts

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state dict as a whole or not at all.

        The state keeps its live dtypes and devices. Parameters are matched by name if both sides
        have names, else by order.

        Where rows have owners, all ranks have to call it, with whole tensors on every rank or with
        DTensors in any layout, from this or another number of ranks.

        Raises:
            CheckpointError: If it does not fit; the message lists the differences.
            DistributedError: If it does not fit on another rank.
        """
        self._follow(quiet=True)
        team, names = self._assembly.team, self._assembly.names
        prepare = partial(self._prepare_to_load, state_dict)
        state_dict, used, saved = team.decide(prepare, "load")
        with self._assembly.thawing(self._entries, self.state), self._samples.loading():
            self._thaw(lambda routed: routed.unit.params[0] in saved)
            checkpoint.load(team, self.param_groups, used, self.state, names, state_dict)
        self._schedule.adopt(team.stacks(self._assembly.buckets))
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _prepare_to_load(
        self, state_dict: Mapping[str, Any]
    ) -> tuple[tuple[Mapping[str, Any], list[dict[str, Any]], set[Tensor]], Facts]:
        state_dict = _hooked(self, "load_state_dict_pre", state_dict)
        self._follow()
        used = self._assembly.follower.used_groups(check=True)
        saved = checkpoint.with_state(used, state_dict)
        thawed = [r.unit.label for r in self._assembly.frozen if r.unit.params[0] in saved]
        return (state_dict, used, saved), {"the frozen units with state": thawed}


def _hooked(optimizer: Optimizer, when: str, state_dict: _T) -> _T:
    """Return a state dict after an optimizer's hooks, which may change a copy of it.

    Args:
        optimizer: The optimizer.
        when: Which of its hooks, such as "state_dict_post".
        state_dict: The state dict.
    """
    changed: Any = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
    for hook in getattr(optimizer, f"_optimizer_{when}_hooks").values():
        result = hook(optimizer, changed)
        changed = changed if result is None else result
    return changed  # type: ignore[no-any-return]
