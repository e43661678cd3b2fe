"""What an author of a strategy imports: `Strategy`, `StepContext`, `Hyperparameter`.

A strategy turns a stack of gradients into a stack of update directions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor

from structprecond.checks import check_value, is_count
from structprecond.core.state import ALL_ROWS, Rows, S, on_device_of
from structprecond.errors import StructureError
from structprecond.groups import PerParameter, PreconditionerGroup
from structprecond.structures import SUPPORTED_STRUCTURES, StructuredMatrix
from structprecond.structures.spec import Structure


@dataclass(frozen=True)
class Hyperparameter:
    """A number that lives in the param group, where a scheduler may change it.

    Args:
        default: Its value if none is given.
        check: Whether a value is allowed.
        requirement: What the check asks for, in words.
    """

    default: Any
    check: Callable[[Any], bool]
    requirement: str

    def validate(self, name: str, value: Any) -> None:
        """Raise `HyperparameterError` unless the value is allowed."""
        check_value(name, value, self.check, self.requirement)


def nonnegative(default: Any) -> Hyperparameter:
    """Return a hyperparameter for finite numbers of at least 0 (also as a one-element tensor)."""
    return Hyperparameter(default, lambda v: 0 <= v < math.inf, "a finite number of at least 0")


def fraction(default: Any) -> Hyperparameter:
    """Return a hyperparameter for numbers from 0 to below 1."""
    return Hyperparameter(default, lambda v: 0 <= v < 1, "a number from 0 to below 1")


def pair_of_fractions(default: tuple[float, float]) -> Hyperparameter:
    """Return a hyperparameter for two numbers from 0 to below 1, such as Adam's betas."""

    def check(value: Any) -> bool:
        first, second = value
        return bool(0 <= first < 1 and 0 <= second < 1)

    return Hyperparameter(default, check, "a pair of numbers from 0 to below 1")


def flag(default: bool) -> Hyperparameter:
    """Return a hyperparameter for True and False."""
    return Hyperparameter(default, lambda v: isinstance(v, bool), "True or False")


def interval(default: Any) -> Hyperparameter:
    """Return a hyperparameter for a number of steps, or a callable of the global step."""
    return Hyperparameter(
        default,
        lambda v: callable(v) or is_count(v),
        "an integer of at least 1, or a callable from the step to a bool",
    )


def decoupled_decay(hp: Mapping[str, Any]) -> float | Tensor:
    """Return the factor of decoupled weight decay, `1 - lr * weight_decay`; 1.0 without any."""
    decay = hp.get("weight_decay", 0)
    factor: float | Tensor = 1 - hp["lr"] * decay if decay != 0 else 1.0
    return factor


@dataclass
class StepContext:
    """What a strategy may know about the step besides gradients and hyperparameters.

    Args:
        t: The update that each row is at, from 1: an int if all rows are at the same one, else
            numbers `(b,)` in float64. `bias_correction` and `reached` work with both.
        seeds: The seed of each row's random numbers, `(b,)`, int64 on the CPU.
        due: The rows to refresh in this step, None for no row.
        failed: The rows whose refresh failed, `(b,)`, bool on the CPU; `refresh_rows` writes it.
        global_step: The number of steps that the optimizer has made before this one.
        batch_size: The number of samples behind the gradients; None if it is unknown.
        params: Returns the stacked parameters `(b, *dims)`; every call gathers them.
        ndim: The number of dimensions of the stack `(b, *dims)`.
        dtype: Its dtype.
        device: Its device.
    """

    t: int | Tensor
    seeds: Tensor
    due: Rows | None
    failed: Tensor
    global_step: int
    batch_size: int | None
    params: Callable[[], Tensor]
    ndim: int
    dtype: torch.dtype
    device: torch.device
    decomposed: bool = False
    """Whether `refresh_rows` was called: decompositions need a host-device sync."""

    def bias_correction(self, beta: float, rows: Rows = ALL_ROWS, ago: int = 0) -> float | Tensor:
        r"""Return \(1 - \beta^t\), what divides a moving average to remove its bias.

        Args:
            beta: The decay of the moving average.
            rows: The rows to return it for.
            ago: Return it for the update \(t - \text{ago}\) instead, for 1 at least.

        Returns:
            A number if all rows are at the same update, else one number per row, which broadcasts
            over the stack: `(b, 1, ...)`.
        """
        if isinstance(self.t, int):
            return float(1 - beta ** max(self.t - ago, 1))
        t = (self.t[on_device_of(rows, self.t)] - ago).clamp(min=1)
        return self._per_row((1 - beta**t).to(self.dtype))

    def reached(self, update: int) -> bool | Tensor:
        """Return whether each row is at a certain update, counted from 1, or beyond it.

        Returns:
            A bool if all rows are at the same update, else one per row, `(b, 1, ...)`.
        """
        if isinstance(self.t, int):
            return self.t >= update
        return self._per_row(self.t >= update)

    def _per_row(self, values: Tensor) -> Tensor:
        return values.to(self.device).reshape(-1, *[1] * (self.ndim - 1))

    @cached_property
    def generators(self) -> list[torch.Generator]:
        """One generator of random numbers per row, on the device of the stack.

        Its numbers depend on the row's seed, which checkpoints hold, and on its update alone: a
        resumed run draws the same ones, whatever other rows do. The seeds follow
        `torch.manual_seed` at construction and the names of the parameters.
        """
        updates = [self.t] * len(self.seeds) if isinstance(self.t, int) else self.t.tolist()
        return [
            # the golden ratio of 2^64 spreads consecutive updates over all seeds
            torch.Generator(self.device).manual_seed((seed + int(t) * 0x9E3779B97F4A7C15) % 2**63)
            for seed, t in zip(self.seeds.tolist(), updates, strict=True)
        ]

    def randn(self, *dims: int) -> Tensor:
        """Return standard normal numbers `(b, *dims)`, each row from its own generator."""
        made = {"dtype": self.dtype, "device": self.device}
        rows = [torch.randn(dims, generator=g, **made) for g in self.generators]  # type: ignore[call-overload]
        return torch.stack(rows)


@dataclass(frozen=True)
class Strategy(ABC, Generic[S]):
    """An optimization rule for stacks `(b, *dims)` whose b rows are independent problems.

    Subclasses are frozen dataclasses: their fields are the static configuration. What may be
    scheduled is declared in `hyperparameters` and lives in the param group; a strategy gets the
    values in a plain dict under the declared names.

    Attributes:
        hyperparameters: The strategy's hyperparameters by name; `lr` always exists.
        structures: The classes of structured matrices that it can work with; empty if it has no
            Kronecker factors.
        combine_params: The grouping rules to use where the user gives none; those that look at
            modules are left out if there is no model.
        refresh_interval: The name of the hyperparameter that says how often rows are refreshed.
        needs_batch_size: Whether the update depends on the batch size.
    """

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]]
    structures: ClassVar[tuple[type[StructuredMatrix], ...]] = (StructuredMatrix,)
    combine_params: ClassVar[tuple[PreconditionerGroup, ...]] = (PerParameter(),)
    refresh_interval: ClassVar[str | None] = None
    needs_batch_size: ClassVar[bool] = False

    @abstractmethod
    def init(
        self,
        like: Tensor,
        structures: tuple[Structure, ...],
        dtypes: tuple[torch.dtype, ...],
    ) -> S:
        """Return the state at the start.

        Args:
            like: An empty stack `(b, *dims)` of the shape, dtype and device that gradients will
                have; may be on the meta device, and its values are undefined.
            structures: The class of structured matrices of every axis, None for no factor.
            dtypes: The dtype of the factor of every axis.
        """

    def begin(self, state: S, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext) -> bool:
        """Initialize rows of the state in place from their first gradients `(b, *dims)`.

        Returns:
            Whether these rows sit the step out: then `update` sees them at the next one.
            Default: False.
        """
        return False

    @abstractmethod
    def update(self, state: S, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext) -> Tensor:
        """Update the state in place and return the update directions `(b, *dims)`.

        The core applies `p <- p - lr * direction`. `grad` is the core's own copy and may be
        overwritten, also with the directions.
        """

    def due(self, steps: Tensor, phase_offsets: Tensor, every: int) -> Tensor:
        """Return which rows to refresh at an interval of `every` steps, `(b,)`.

        Default: before update t = 0, 1, ... that the interval divides.

        Args:
            steps: The number of updates that each row has had.
            phase_offsets: How many steps earlier than at their own multiples rows are refreshed.
            every: The interval.
        """
        return (steps + phase_offsets) % every == 0

    def decay_factors(self, hp: Mapping[str, Any]) -> tuple[float | Tensor, float | Tensor]:
        """Return what the core multiplies parameters by before and after the update.

        Default: decoupled weight decay before it, if there is a hyperparameter `weight_decay`. A
        strategy that decays parameters in `update` returns `(1.0, 1.0)`.
        """
        return decoupled_decay(hp), 1.0

    def constraint(self) -> Callable[[Tensor], Tensor] | None:
        """Return a function from stacked parameters `(b, *dims)` to the values they should have.

        The core applies it after every update. Default: None, for no constraint.
        """
        return None

    def adapt_structures(
        self, structures: tuple[Structure, ...], dims: Sequence[int], order: int, units: str
    ) -> tuple[Structure, ...]:
        """Return the structures that the strategy uses where the user asks for `structures`.

        Args:
            structures: What the user asks for, axis by axis.
            dims: The sizes of the axes.
            order: The number of axes of the parameters themselves.
            units: The parameters concerned, for errors.

        Raises:
            StructureError: If the strategy cannot work with one of the structures.
        """
        for structure in structures:
            if structure is not None and not issubclass(structure, self.structures):
                usable = [
                    name
                    for name, known in SUPPORTED_STRUCTURES.items()
                    if known is None or issubclass(known, self.structures)
                ]
                raise StructureError(
                    f"{type(self).__name__} cannot use the structure {structure.name!r}, given for "
                    f"{units}. It can use {', '.join(usable)}."
                )
        return structures
