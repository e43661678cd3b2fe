"""Base of strategies that orthogonalize, or otherwise normalize, momentum."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from structprecond.checks import check_choice, check_flags
from structprecond.core.results import usable
from structprecond.core.state import State
from structprecond.core.strategy import (
    Hyperparameter,
    StepContext,
    Strategy,
    fraction,
    nonnegative,
)
from structprecond.errors import StructPrecondError
from structprecond.groups import Matricize, PreconditionerGroup, StackExperts
from structprecond.structures.spec import Structure

WeightDecayMethod = Literal["decoupled", "independent", "l2", "palm"]


@dataclass
class MomentumState(State):
    """State of an orthogonalized momentum for a stack `(b, *dims)`.

    Args:
        momentum_buffer: The moving average of the gradients `(b, *dims)`.
    """

    momentum_buffer: Tensor


@dataclass(frozen=True)
class OrthogonalizedMomentumStrategy(Strategy[Any]):
    r"""Base of update rules that step along a normalized momentum, such as Muon.

    \[ m \leftarrow \mu m + (1 - \mu) g, \quad
       u = m \text{ or, with Nesterov momentum, } (1 - \mu) g + \mu m, \]
    \[ p \leftarrow p - \eta \, \mathrm{scaled\_orthogonalize\_fn}(u). \]

    Subclasses define `scaled_orthogonalize_fn` for matrices `(out, in)`. Trailing axes are
    flattened: a convolution is `(out, in * kh * kw)`, and a vector is a column.

    Weight decay \(\lambda\) comes before the momentum: "decoupled"
    \(p \leftarrow (1 - \eta \lambda) p\), "independent" \(p \leftarrow (1 - \lambda) p\), "palm"
    \(p \leftarrow (1 - \eta^2 \lambda) p\), or "l2" \(g \leftarrow g + \lambda p\).

    Args:
        nesterov: Whether to use Nesterov momentum. Default: False.
        weight_decay_method: One of the four above. Default: "decoupled".
        before_weight_update: Called with the stacked parameters and updates `(b, *dims)` before
            decay and update; returns the updates to use. Default: None.
        after_weight_update: Called with the stacked parameters `(b, *dims)` after the update;
            returns their new values, for constraints such as unit rows. Must not count calls, since
            gradients that may overflow are tried on a copy first. Default: None.

    If a hook or `scaled_orthogonalize_fn` raises, or returns what is no floating-point tensor of
    the right shape, the step changes nothing: no parameter, state or counter, of no layer. For
    that, a step with hooks, or with a strategy of your own, holds a copy of the momentum until all
    of these have run.

    Raises:
        StructPrecondError: If `weight_decay_method` is not one of the four.

    Example:
        >>> from dataclasses import dataclass
        >>> from structprecond.linalg import polar_factor
        >>> @dataclass(frozen=True)
        ... class ExactStrategy(OrthogonalizedMomentumStrategy):
        ...     def scaled_orthogonalize_fn(self, update):
        ...         return polar_factor(update)
        >>> optimizer = StructuredOptimizer(nn.Linear(3, 2), strategy=ExactStrategy())
    """

    nesterov: bool = False
    weight_decay_method: WeightDecayMethod = "decoupled"
    before_weight_update: Callable[[Tensor, Tensor], Tensor] | None = None
    after_weight_update: Callable[[Tensor], Tensor] | None = None

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "lr": nonnegative(3e-4),
        "momentum": fraction(0.95),
        "weight_decay": nonnegative(0.01),
    }
    structures = ()
    combine_params: ClassVar[tuple[PreconditionerGroup, ...]] = (StackExperts(), Matricize())

    def __post_init__(self) -> None:
        check_choice("weight_decay_method", self.weight_decay_method, WeightDecayMethod)
        check_flags(nesterov=self.nesterov)
        for name in ("before_weight_update", "after_weight_update"):
            hook = getattr(self, name)
            if hook is not None and not callable(hook):
                raise StructPrecondError(f"{name} takes a function or None, got {hook!r}.")

    @abstractmethod
    def scaled_orthogonalize_fn(self, update: Tensor) -> Tensor:
        """Return the directions `(b, out, in)` of stacked momenta `(b, out, in)`."""

    def init(
        self, like: Tensor, structures: tuple[Structure, ...], dtypes: tuple[torch.dtype, ...]
    ) -> MomentumState:
        """Return a zero momentum."""
        return MomentumState(torch.zeros_like(like))

    def decay_factors(self, hp: Mapping[str, Any]) -> tuple[float | Tensor, float | Tensor]:
        """Return the factor of weight decay, which comes before the update."""
        lr, decay = hp["lr"], hp["weight_decay"]
        if decay == 0:
            return 1.0, 1.0
        rates = {"decoupled": lr * decay, "independent": decay, "palm": lr * lr * decay, "l2": 0}
        return 1 - rates[self.weight_decay_method], 1.0

    def update(self, state: Any, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext) -> Tensor:
        """Update the momentum and return the directions."""
        if self.weight_decay_method == "l2" and hp["weight_decay"] != 0:
            grad.add_(ctx.params(), alpha=hp["weight_decay"])
        momentum = state.momentum_buffer.lerp_(grad, 1 - hp["momentum"])
        update = grad.lerp_(momentum, hp["momentum"]) if self.nesterov else momentum
        matrices = update.flatten(2) if update.ndim > 2 else update.unsqueeze(-1)
        name = f"{type(self).__name__}.scaled_orthogonalize_fn"
        # not view: a strategy of the user's own may return a transpose
        direction = usable(self.direction(state, matrices, hp), matrices, name).reshape(grad.shape)
        if self.before_weight_update is not None:
            given = self.before_weight_update(ctx.params(), direction)
            direction = usable(given, grad, "before_weight_update")
        return direction

    def constraint(self) -> Callable[[Tensor], Tensor] | None:
        """Return the hook after the weight update."""
        hook = self.after_weight_update
        if hook is None:
            return None
        return lambda params: usable(hook(params), params, "after_weight_update")

    def direction(self, state: Any, update: Tensor, hp: Mapping[str, Any]) -> Tensor:
        """Return the directions of momenta `(b, out, in)`, for subclasses with more state."""
        return self.scaled_orthogonalize_fn(update)
