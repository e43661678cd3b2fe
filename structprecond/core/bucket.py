"""Buckets: stacks of units with the same shape, grouping, structures, dtypes and device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Size, Tensor, nn

from structprecond.core.counters import Counters
from structprecond.core.layout import Layout
from structprecond.core.policies import Policy
from structprecond.core.rounding import Rounding, is_low_precision
from structprecond.core.routing import hyperparameters_of
from structprecond.core.state import Rows, State, on_device_of
from structprecond.core.strategy import Strategy, decay_of, interval_of
from structprecond.core.units import Unit
from structprecond.errors import StructPrecondError
from structprecond.structures.spec import Structure

_TRUSTED = {__name__.partition(".")[0], "abc", "builtins", "typing"}


@dataclass(frozen=True)
class BucketKey:
    """The properties that units of one stack share."""

    rule: Any
    shape: Size
    structures: tuple[Structure, ...]
    dtypes: tuple[torch.dtype, ...]
    param_dtype: torch.dtype
    device: torch.device
    decays: bool = True
    """Whether the units have weight decay; False for those that `no_decay` leaves out."""
    policies: tuple[Policy, ...] = ()
    """What changes the directions before the parameters move."""

    def refresh_cost(self) -> int:
        """Return the number of operations to refresh one row, up to a constant factor."""
        axes = zip(self.structures, self.shape, strict=True)
        return sum(s.refresh_cost(dim) for s, dim in axes if s is not None)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of stacks and states: float32, or float64 for float64 parameters."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def interval_in(group: Mapping[str, Any], strategy: Strategy[Any], prefix: str) -> Any:
    """Return a strategy's refresh interval in a param group; False if it has no refreshes."""
    name = interval_of(strategy)
    return False if name is None else group[f"{prefix}{name}"]


def weight_decay_in(
    group: Mapping[str, Any], strategy: Strategy[Any], prefix: str, decays: bool
) -> float | None:
    """Return a strategy's weight decay; None if it has none.

    Args:
        group: The param group.
        strategy: The strategy.
        prefix: The prefix of its hyperparameters in the group.
        decays: Whether the units have weight decay.
    """
    name = decay_of(strategy)
    if name is None:
        return None
    return float(hyperparameters_of(strategy, group, prefix)[name]) if decays else 0.0


def runs_other_code(strategy: Strategy[Any], key: BucketKey) -> bool:
    """Return whether a step calls code from outside the library."""
    classes = [type(strategy), *map(type, key.policies)]
    classes += [s for s in key.structures if s is not None]
    bases = {base for cls in classes for base in cls.__mro__}
    ours = {base.__module__.partition(".")[0] for base in bases} <= _TRUSTED
    values = [getattr(strategy, f.name) for f in fields(strategy)] if ours else []
    return not ours or any(callable(value) for value in values)


class Bucket:
    """A stack of units from one param group; owns their state.

    Args:
        group: The user's param group, read at every step.
        strategy: The strategy.
        prefix: The prefix of the strategy's hyperparameters in the param group.
        key: The properties that the units share.
        units: The units; unit i owns the rows `spans[i]` of every stacked tensor.
        rules: For each unit, the role or pattern that routed it to the strategy.
        rounding: How low-precision parameters are rounded.

    Attributes:
        layout: The places of the units' parameters in the stack.
        state: The strategy's state, stacked along dimension 0.
        counters: The core's counters for each row.
        compensation: The rounding error of the parameters `(b, *dims)`, in their dtype; None
            unless they have low precision and rounding is "kahan".
        policy_numbers: The numbers that policies keep for each row `(b,)`, by name.
        refresh_decomposes: Whether a refresh decomposes matrices, which needs a host-device sync;
            None before the first refresh.
        staggered_over: The interval for which the rows' phase offsets were assigned; None if that
            is not known.
        runs_other_code: Whether a step calls code from outside the library: a hook, or a strategy,
            structure or policy of the user's own.
    """

    def __init__(
        self,
        group: dict[str, Any],
        strategy: Strategy[Any],
        prefix: str,
        key: BucketKey,
        units: Sequence[Unit],
        rules: Sequence[str],
        rounding: Rounding,
    ) -> None:
        self.group, self.strategy, self.prefix, self.key = group, strategy, prefix, key
        self.layout, self.rules, self.rounding = Layout(units), list(rules), rounding
        self.rows = self.layout.rows
        self.device = key.device
        self.state: State = strategy.init(self.empty(), key.structures, key.dtypes)
        self.counters = Counters.of(units)
        self.compensation: Tensor | None = None
        if rounding == "kahan" and is_low_precision(key.param_dtype):
            self.compensation = torch.zeros(self.shape, dtype=key.param_dtype, device=key.device)
        self.policy_numbers = {
            name: torch.full((self.rows,), value, dtype=self.dtype, device=key.device)
            for policy in key.policies
            for name, value in policy.initial.items()
        }
        self.refresh_decomposes: bool | None = None
        self.staggered_over: int | None = None
        self.runs_other_code = runs_other_code(strategy, key)
        self._check_names()

    def _check_names(self) -> None:
        own = {field.name for field in fields(Counters)} | {"compensation", *self.policy_numbers}
        if shadowing := sorted(own & set(self.state.named_tensors())):
            raise StructPrecondError(
                f"The state of {type(self.strategy).__name__} has fields called "
                f"{', '.join(shadowing)}, which are names that the core uses. Rename them."
            )

    @property
    def units(self) -> list[Unit]:
        """The units."""
        return self.layout.units

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters of all units."""
        return self.layout.params

    @property
    def spans(self) -> list[slice]:
        """The rows of each unit."""
        return self.layout.spans

    @property
    def shape(self) -> Size:
        """The shape `(b, *dims)` of the stack."""
        return Size([self.rows, *self.key.shape])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stack."""
        return compute_dtype(self.key.param_dtype)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The strategy's current hyperparameters, under their own names."""
        hp = hyperparameters_of(self.strategy, self.group, self.prefix)
        decay = None if self.key.decays else decay_of(self.strategy)
        if decay is not None:
            hp[decay] = 0.0
        if isinstance(hp["lr"], Tensor):
            # a tensor stays a tensor: reading it would need a host-device sync
            hp["lr"] = hp["lr"].to(self.device).reshape(())
        return hp

    @property
    def weight_decay(self) -> float | None:
        """The current weight decay; None if the strategy has none."""
        return weight_decay_in(self.group, self.strategy, self.prefix, self.key.decays)

    @property
    def interval(self) -> Any:
        """The current refresh interval; False if the strategy has no refreshes."""
        return interval_in(self.group, self.strategy, self.prefix)

    def empty(self) -> Tensor:
        """Return an uninitialized stack `(b, *dims)`."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def named_tensors(self) -> dict[str, Tensor]:
        """Return all state by name, stacked, the counters included."""
        more = {} if self.compensation is None else {"compensation": self.compensation}
        return (
            self.counters.named_tensors() | more | self.policy_numbers | self.state.named_tensors()
        )

    def unit_tensors(self) -> list[dict[str, Tensor]]:
        """Return views of each unit's rows by name; units of one row have no row dimension."""
        stacked = self.named_tensors()
        return [{name: tensor[own] for name, tensor in stacked.items()} for own in self._own_rows]

    def per_unit(self, field: str) -> list[tuple[Any, ...]]:
        """Return a field of the state, a tuple of stacked matrices or None, for every unit."""
        matrices = getattr(self.state, field)
        return [tuple(None if m is None else m[own] for m in matrices) for own in self._own_rows]

    @property
    def _own_rows(self) -> list[slice | int]:
        """The index of each unit's rows: an integer for a single row."""
        units = zip(self.units, self.spans, strict=True)
        return [span if unit.rule.stacked else span.start for unit, span in units]

    def twin(self) -> Bucket:
        """Return a copy with its own state and parameters, for a trial step."""
        twin = copy(self)
        twin.state = self.state.map(torch.clone)
        twin.counters = self.counters.map(torch.clone)
        twin.compensation = None if self.compensation is None else self.compensation.clone()
        twin.policy_numbers = {
            name: numbers.clone() for name, numbers in self.policy_numbers.items()
        }
        twin.layout = copy(self.layout)
        twin.layout.params = [nn.Parameter(p.detach().clone()) for p in self.params]
        return twin

    def follow_device(self, names: Mapping[nn.Parameter, str]) -> bool:
        """Move the state to the parameters' device; return whether it moved.

        A move makes all views of the state stale.

        Raises:
            StructPrecondError: If the parameters are on several devices.
        """
        devices = {p.device for p in self.params}
        if devices == {self.device}:
            return False
        if len(devices) > 1:
            raise StructPrecondError(
                f"Parameters that are stacked together are on several devices: "
                f"{', '.join(f'{names[p]} on {p.device}' for p in self.params)}. Move the whole "
                "model, or build a new optimizer."
            )
        (self.device,) = devices
        self.state = self.state.map(lambda t: t.to(self.device))
        if self.compensation is not None:
            self.compensation = self.compensation.to(self.device)
        self.policy_numbers = {
            name: numbers.to(self.device) for name, numbers in self.policy_numbers.items()
        }
        return True

    def keep(self, units: Sequence[bool], renewed: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Drop the other units with their state, and replace parameters.

        Makes all views of the state stale.

        Args:
            units: Whether each unit stays.
            renewed: The parameters that stay, and for each the one that is updated from now on.
        """
        if not all(units):
            rows = self.layout.live_rows(units).nonzero().squeeze(1)
            self.state = self.state.map(lambda t: t[on_device_of(rows, t)])
            self.policy_numbers = {
                name: t[on_device_of(rows, t)] for name, t in self.policy_numbers.items()
            }
            self.counters = self.counters.map(lambda t: t[rows])
            if self.compensation is not None:
                self.compensation = self.compensation[on_device_of(rows, self.compensation)]
            self.rules = [rule for rule, on in zip(self.rules, units, strict=True) if on]
        left = [unit for unit, on in zip(self.units, units, strict=True) if on]
        if left:
            self.layout = Layout([unit.renewed(renewed) for unit in left])
            self.rows = self.layout.rows
        else:
            self.layout.units.clear()

    # --- gradients and parameters ----------------------------------------------------------------

    def gather_grads(self, live: Sequence[bool]) -> Tensor:
        """Return the stacked gradients of the live units; the other rows are uninitialized.

        If no unit is live, the stack has no rows.
        """
        if not any(live):
            return torch.empty((0, *self.key.shape), dtype=self.dtype, device=self.device)
        stack = self.empty()
        self.layout.gather(self.layout.live_grads(live), live, stack)
        return stack

    def gather_params(self, rows: Rows) -> Tensor:
        """Return some rows of the stacked parameters."""
        stack = self.empty()
        self.layout.gather(self.params, [True] * len(self.units), stack)
        return stack[rows]

    def scatter(self, stack: Tensor, rows: Rows, live: Sequence[bool]) -> list[Tensor]:
        """Split a stack of some rows into one tensor per live parameter."""
        if isinstance(rows, Tensor):
            whole = stack.new_zeros(self.shape)
            stack = whole.index_copy_(0, rows.to(self.device), stack)
        return self.layout.scatter(stack.contiguous(), live)

    def write_params(self, stack: Tensor, rows: Rows, live: Sequence[bool]) -> None:
        """Copy rows into the live parameters."""
        torch._foreach_copy_(list(self.layout.live_params(live)), self.scatter(stack, rows, live))
