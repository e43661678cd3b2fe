"""What a strategy is: a rule that turns a stack of gradients into a stack of update directions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, get_args

import torch
from torch import Tensor

from structprecond.core.state import Rows, S
from structprecond.errors import HyperparameterError, StructPrecondError, StructureError
from structprecond.groups import PerParameter, PreconditionerGroup
from structprecond.structures import SUPPORTED_STRUCTURES, StructuredMatrix
from structprecond.structures.spec import Structure


@dataclass(frozen=True)
class Hyperparameter:
    """A number that lives in the param group, where it may be scheduled.

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
        try:
            allowed = bool(self.check(value))
        except (TypeError, ValueError, RuntimeError):
            allowed = False
        if not allowed:
            raise HyperparameterError(f"{name} must be {self.requirement}, got {value!r}.")


def nonnegative(default: Any) -> Hyperparameter:
    """Return a hyperparameter for finite numbers of at least 0 (also as a one-element tensor)."""
    return Hyperparameter(default, lambda v: 0 <= v < math.inf, "a finite number of at least 0")


def positive(default: Any) -> Hyperparameter:
    """Return a hyperparameter for finite numbers above 0."""
    return Hyperparameter(default, lambda v: 0 < v < math.inf, "a finite number above 0")


def fraction(default: Any) -> Hyperparameter:
    """Return a hyperparameter for numbers from 0 to below 1."""
    return Hyperparameter(default, lambda v: 0 <= v < 1, "a number from 0 to below 1")


def flag(default: bool) -> Hyperparameter:
    """Return a hyperparameter for True and False."""
    return Hyperparameter(default, lambda v: isinstance(v, bool), "True or False")


def interval(default: Any) -> Hyperparameter:
    """Return a hyperparameter for a number of steps, or a callable of the global step."""

    def check(value: Any) -> bool:
        return callable(value) or (isinstance(value, int) and value is not True and value >= 1)

    return Hyperparameter(
        default, check, "an integer of at least 1, or a callable from the step to a bool"
    )


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise `StructPrecondError` unless a value is one of a `Literal`'s."""
    if value not in get_args(choices):
        raise StructPrecondError(
            f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}."
        )


def check_flags(**flags: object) -> None:
    """Raise `StructPrecondError` unless all values are True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise StructPrecondError(f"{name} must be True or False, got {value!r}.")


def check_positive(**numbers: Any) -> None:
    """Raise `HyperparameterError` unless all values are finite numbers above 0."""
    for name, value in numbers.items():
        positive(None).validate(name, value)


@dataclass
class StepContext:
    """What a strategy may know about the step besides gradients and hyperparameters.

    Args:
        steps: How many updates each row has had before this one, `(b,)`, int64 on the CPU. While a
            step is recorded for replays, which have other numbers, float64 on the stack's device.
        due: The rows whose interval says refresh, None if no row is due.
        failed: For the strategy to note down which rows it could not refresh, `(b,)`, bool on the
            CPU.
        global_step: How many steps the optimizer has made before this one.
        batch_size: The number of samples behind the gradients; None if the optimizer does not know.
        params: Returns the stacked parameters `(b, *dims)`; gathered at every call.
    """

    steps: Tensor
    due: Rows | None
    failed: Tensor
    global_step: int
    batch_size: int | None
    params: Callable[[], Tensor]


@dataclass(frozen=True)
class Strategy(ABC, Generic[S]):
    """An optimization rule for stacks `(b, *dims)` whose b rows are independent problems.

    Subclasses are frozen dataclasses: their fields are the static configuration. What may be
    scheduled is declared in `hyperparameters` and lives in the param group.

    Attributes:
        hyperparameters: The strategy's hyperparameters by name; `lr` always exists.
        decay: Where the core applies weight decay, `p <- decay_factor(hp) * p`: before or after
            the update; "inside" leaves all decay to the strategy.
        refresh_interval: The name of the hyperparameter that says how often rows are refreshed.
        structures: The classes of structured matrices that it can work with; empty if it has no
            Kronecker factors.
        combine_params: The grouping rules that suit it, where the user gives none; those that look
            at modules are left out if there is no model.
        refresh_phase: Rows are refreshed before update t = 0, 1, ... (phase 0) or after update
            t = 1, 2, ... (phase 1) that their interval divides.
        needs_batch_size: Whether the update depends on the batch size.
        refresh_waits: Whether a refresh looks at values on the device, as decompositions do.
    """

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]]
    decay: ClassVar[Literal["before", "after", "inside"]]
    refresh_interval: ClassVar[str | None] = None
    structures: ClassVar[tuple[type[StructuredMatrix], ...]] = (StructuredMatrix,)
    combine_params: ClassVar[tuple[PreconditionerGroup, ...]] = (PerParameter(),)
    refresh_phase: ClassVar[Literal[0, 1]] = 0
    needs_batch_size: ClassVar[bool] = False
    refresh_waits: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The name of the class, short and in lower case: `adamw` for `AdamWStrategy`."""
        return type(self).__name__.removesuffix("Strategy").lower()

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

    def due(self, steps: Tensor, turns: Tensor, every: int) -> Tensor:
        """Return which rows an interval of `every` steps says to refresh, `(b,)`.

        Args:
            steps: How many updates each row has had before this one.
            turns: How many steps earlier than the others each row is refreshed.
            every: The interval.
        """
        return (steps + turns + self.refresh_phase) % every == 0

    def skips_first(self, structures: tuple[Structure, ...]) -> bool:
        """Return whether a row's first gradient only initializes its state."""
        return False

    def begin(self, state: S, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext) -> None:
        """Initialize the state in place from the first gradients `(b, *dims)`, to be left as is."""

    @abstractmethod
    def update(self, state: S, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext) -> Tensor:
        """Update the state in place and return the update directions `(b, *dims)`.

        The core applies `p <- p - lr * direction`. `grad` is the core's own copy and may be
        overwritten, also with the directions.
        """

    def decay_factor(self, hp: Mapping[str, Any]) -> float | Tensor:
        """Return what the core multiplies the parameters by to decay them."""
        factor: float | Tensor = 1 - hp["lr"] * hp["weight_decay"]
        return factor

    def constraint(self) -> Callable[[Tensor], Tensor] | None:
        """Return what maps stacked parameters `(b, *dims)` to the values that they shall have.

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
