"""The interface for authors of strategies: `Strategy`, `StepContext`, `Hyperparameter`.

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

from structprecond.checks import A_COUNT, as_number, check_value, is_count
from structprecond.core.policies import Policy
from structprecond.core.state import ALL_ROWS, Rows, S, on_device_of
from structprecond.errors import StructureError
from structprecond.groups import PerParameter, PreconditionerGroup
from structprecond.structures import SUPPORTED_STRUCTURES, StructuredMatrix
from structprecond.structures.auto import auto_structures
from structprecond.structures.spec import Structure


@dataclass(frozen=True)
class Hyperparameter:
    r"""A value in the param group, where a scheduler may change it.

    Args:
        default: The default value.
        check: Returns whether a value is valid.
        requirement: The check in words, for messages.
        is_decay: Whether it is the strategy's weight decay, as one called `weight_decay` always is.
        refresh_operations: For a refresh interval, the operations of refreshing a dense factor of
            size n, divided by \(n^3\), to estimate costs; None for other hyperparameters.
    """

    default: Any
    check: Callable[[Any], bool]
    requirement: str
    is_decay: bool = False
    refresh_operations: float | None = None

    def validate(self, name: str, value: Any) -> None:
        """Raise `HyperparameterError` unless the value is valid."""
        check_value(name, value, self.check, self.requirement)


def nonnegative(default: Any) -> Hyperparameter:
    """Return a hyperparameter for finite numbers of at least 0 (also as a tensor without axes)."""

    def check(value: Any) -> bool:
        return 0 <= as_number(value) < math.inf

    return Hyperparameter(default, check, "a finite number of at least 0")


def fraction(default: Any) -> Hyperparameter:
    """Return a hyperparameter for numbers from 0 to below 1."""
    return Hyperparameter(default, lambda v: 0 <= as_number(v) < 1, "a number from 0 to below 1")


def pair_of_fractions(default: tuple[float, float]) -> Hyperparameter:
    """Return a hyperparameter for two numbers from 0 to below 1, such as Adam's betas."""

    def check(value: Any) -> bool:
        # a set has no order, and entries of tensors and arrays are no numbers for torch's kernels
        fine = isinstance(value, tuple | list) and not any(isinstance(v, Tensor) for v in value)
        return fine and len(value) == 2 and all(0 <= as_number(v) < 1 for v in value)

    return Hyperparameter(default, check, f"a pair of numbers from 0 to below 1, as in {default}")


def flag(default: bool) -> Hyperparameter:
    """Return a hyperparameter for True and False."""
    return Hyperparameter(default, lambda v: isinstance(v, bool), "True or False")


def interval(default: Any, operations: float = 25.0) -> Hyperparameter:
    """Return a refresh interval: a number of steps, or a callable of the global step.

    Args:
        default: The default interval.
        operations: The operations of a refresh, see `Hyperparameter`. Default: 25.0, those of an
            eigendecomposition.
    """
    return Hyperparameter(
        default,
        lambda v: callable(v) or is_count(v),
        f"{A_COUNT}, or a callable that returns a bool for the step",
        refresh_operations=operations,
    )


def decoupled_decay(hp: Mapping[str, Any]) -> float | Tensor:
    """Return the factor of decoupled weight decay: `1 - lr * weight_decay`, or 1.0 without it."""
    decay = hp.get("weight_decay", 0)
    factor: float | Tensor = 1 - hp["lr"] * decay if decay != 0 else 1.0
    return factor


@dataclass
class StepContext:
    """The context of a step, besides gradients and hyperparameters.

    Args:
        t: The number of each row's update, from 1: an int if all rows are at the same one, else
            `(b,)` in float64. `bias_correction` and `reached` handle both.
        seeds: The seed of each row's random numbers, `(b,)`, int64 on the CPU, or on the
            device in a captured step.
        due: The rows to refresh in this step, None for no row.
        failed: The rows whose refresh failed, `(b,)`, bool on the CPU; set by `refresh_rows`.
        global_step: The number of steps that the optimizer has made before this one.
        batch_size: The number of samples behind the gradients; None if unknown.
        params: Returns the stacked parameters `(b, *dims)`; every call gathers them.
        ndim: The number of dimensions of the stack `(b, *dims)`.
        dtype: The dtype of the stack.
        device: The device of the stack.
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
    """Whether `refresh_rows` was called, so that the step needs a host-device sync."""

    def bias_correction(self, beta: float, rows: Rows = ALL_ROWS, ago: int = 0) -> float | Tensor:
        r"""Return \(1 - \beta^t\), the divisor that corrects the bias of a moving average.

        Args:
            beta: The decay of the moving average.
            rows: The rows to return it for. Default: all rows.
            ago: Use the update \(\max(t - \text{ago}, 1)\) instead of t; may be negative.
                Default: 0.

        Returns:
            A number if all rows are at the same update, else one per row, `(b, 1, ...)`.
        """
        if isinstance(self.t, int):
            return float(1 - beta ** max(self.t - ago, 1))
        t = (self.t[on_device_of(rows, self.t)] - ago).clamp(min=1)
        return self._per_row((1 - beta**t).to(self.dtype))

    def reached(self, update: int) -> bool | Tensor:
        """Return whether each row has reached an update, counted from 1.

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
        """One random generator per row, on the device of the stack.

        It depends only on the row's seed, which checkpoints hold, and on the row's update. So a
        resumed run draws the same bits. Seeds come from `torch.manual_seed` at construction and the
        parameters' names.
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
    r"""An update rule for stacks `(b, *dims)` of b independent rows.

    Subclasses are frozen dataclasses whose fields are the static configuration. Values that may be
    scheduled are declared in `hyperparameters` and stay in the param group; methods get them as a
    dict `hp` under the declared names.

    Attributes:
        hyperparameters: The hyperparameters by name; `lr` is required.
        structures: The classes of structured matrices that it can use; empty without Kronecker
            factors.
        combine_params: The groupings if the user gives none; without a model, those that need
            modules are left out.
        policies: The policies if the user gives none.
        needs_batch_size: Whether the update depends on the batch size.
    """

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]]
    structures: ClassVar[tuple[type[StructuredMatrix], ...]] = (StructuredMatrix,)
    combine_params: ClassVar[tuple[PreconditionerGroup, ...]] = (PerParameter(),)
    policies: ClassVar[tuple[Policy, ...]] = ()
    needs_batch_size: ClassVar[bool] = False

    @abstractmethod
    def init(
        self,
        like: Tensor,
        structures: tuple[Structure, ...],
        dtypes: tuple[torch.dtype, ...],
    ) -> S:
        """Return the initial state.

        Args:
            like: An uninitialized stack `(b, *dims)` with the shape, dtype and device of the
                gradients; may be on the meta device.
            structures: The class of structured matrices of each axis, None for no factor.
            dtypes: The dtype of each axis's factor.
        """

    def can_begin(self, state: S, grad: Tensor) -> Tensor | None:
        """Return the mask `(b,)` of rows that `begin` can initialize from these gradients.

        The others wait: they are not updated, and the next gradient is their first one again.
        Default: None, all of them.

        Args:
            state: The state of the whole stack, which tells how it is laid out.
            grad: The gradients of the rows that are not initialized `(b, *dims)`.
        """
        return None

    def begin(self, state: S, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext) -> bool:
        """Initialize rows of the state in place from their first gradients `(b, *dims)`.

        Returns:
            Whether these rows sit the step out, so that their first `update` is in the next step.
            Default: False.
        """
        return False

    @abstractmethod
    def update(self, state: S, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext) -> Tensor:
        """Update the state in place and return the update directions `(b, *dims)`.

        The core applies `p <- p - lr * direction`. `grad` is a copy that may be overwritten, also
        with the directions. If a strategy of your own raises here or in another method, or returns
        no floating-point tensor of that shape, the step changes nothing, in no bucket: the core
        holds a copy of its state until all strategies from outside the library have run.
        """

    def due(self, steps: Tensor, phase_offsets: Tensor, every: int) -> Tensor:
        """Return the mask `(b,)` of rows to refresh.

        Default: rows where the interval divides the number of updates plus the phase offset.

        Args:
            steps: The number of past updates of each row.
            phase_offsets: The phase offset of each row's refreshes, in steps.
            every: The refresh interval in steps.
        """
        return (steps + phase_offsets) % every == 0

    def decay_factors(self, hp: Mapping[str, Any]) -> tuple[float | Tensor, float | Tensor]:
        """Return the factors on the parameters before and after the update.

        Default: decoupled weight decay before it, if there is a hyperparameter `weight_decay`. A
        strategy that decays in `update` returns `(1.0, 1.0)`.
        """
        return decoupled_decay(hp), 1.0

    def constraint(self) -> Callable[[Tensor], Tensor] | None:
        """Return a function that projects stacked parameters `(b, *dims)` after every update.

        It gets the moved parameters before they are written; if it fails, nothing has changed.
        Default: None, for no constraint.
        """
        return None

    def auto_structures(self, dims: Sequence[int]) -> tuple[Structure, ...]:
        """Return the structures that `structures="auto"` stands for.

        Default: `dense`, and no factor for an axis that is longer than 1,024 and more than 8 times
        as long as all other axes together.

        Args:
            dims: The sizes of the axes.
        """
        return auto_structures(dims)

    def adapt_structures(
        self, structures: tuple[Structure, ...], dims: Sequence[int], order: int, units: str
    ) -> tuple[Structure, ...]:
        """Return the structures that the strategy uses if the user requests `structures`.

        Args:
            structures: The requested structure of each axis.
            dims: The sizes of the axes.
            order: The largest number of axes of the ungrouped parameters.
            units: The names of the parameters, for messages.

        Raises:
            StructureError: If the strategy cannot use one of the structures.
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


def decay_of(strategy: Strategy[Any]) -> str | None:
    """Return the name of a strategy's hyperparameter that is the weight decay; None without one."""
    for name, hyperparameter in strategy.hyperparameters.items():
        if name == "weight_decay" or hyperparameter.is_decay:
            return name
    return None


def interval_of(strategy: Strategy[Any]) -> str | None:
    """Return the name of a strategy's refresh interval; None without refreshes."""
    hyperparameters = strategy.hyperparameters.items()
    return next((name for name, h in hyperparameters if h.refresh_operations is not None), None)
