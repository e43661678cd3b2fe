"""PSGD-Kron: preconditioned SGD with Kronecker factors that are fitted to the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from structprecond.checks import check_nonnegative, check_positive
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.options import FactorOptions, from_keywords
from structprecond.core.policies import factors_to_rms, per_row
from structprecond.core.state import State, rows_of
from structprecond.core.strategy import (
    Hyperparameter,
    StepContext,
    Strategy,
    fraction,
    interval,
    nonnegative,
)
from structprecond.linalg.powers import entrywise_power
from structprecond.linalg.product import matmul
from structprecond.linalg.spectral import spectral_norm_bound
from structprecond.structures import DenseMatrix, DiagonalMatrix
from structprecond.structures.auto import sizes_of_others
from structprecond.structures.mode_product import matricize, multiply_axes
from structprecond.structures.spec import Structure

# how many updates of the factors are between two that balance them
_BALANCED_EVERY = 100
_LARGEST_RMS, _LARGEST_ENTRY = 2.0, 10.0
_LARGEST_TURN = 1 / 8


@dataclass
class PSGDKronState(State):
    """State of PSGD-Kron for a stack `(b, d1, ..., dN)`.

    Args:
        factors: The factors Q of the preconditioner, dense `(b, dk, dk)` or diagonal `(b, dk)`;
            None for an axis without one.
        bounds: The smoothed bounds of the curvature of each axis `(b,)`.
        exp_avg: The momentum `(b, d1, ..., dN)`.
    """

    factors: tuple[DenseMatrix | DiagonalMatrix | None, ...]
    bounds: tuple[Tensor | None, ...]
    exp_avg: Tensor


@dataclass(frozen=True)
class PSGDKronStrategy(Strategy[PSGDKronState]):
    r"""The rule of PSGD with Kronecker factors, whitening, in the form \(Q^{0.5} E Q^{1.5}\).

    Each axis k has a factor \(Q_k\), and \(P_k = Q_k^\top Q_k\). With \(D = \prod_k d_k\), the
    first gradient that is not zero initializes \(Q_k = s^{1/N} I\) with
    \(s = (\mathrm{mean}(G^4) + \delta^4)^{-1/8}\). At every update, with noise \(V \sim N(0, 1)\)
    and \(\delta' = \delta + \epsilon |G|\) for the machine precision \(\epsilon\),

    \[ P_G = (G + \delta' V) \times_1 P_1 \dots \times_N P_N, \quad
       T_k = P_{G,(k)} P_{G,(k)}^\top, \quad t_k = D / d_k, \quad \ell_k = |T_k| + t_k, \]
    \[ L_k \leftarrow \max(\beta_L L_k + (1 - \beta_L) \ell_k, \ell_k), \quad
       Q_k \leftarrow Q_k - \frac{\eta_P}{L_k} (T_k Q_k - t_k Q_k), \]

    where \(|T|\) is a lower bound of the spectral norm (`linalg.spectral_norm_bound`), or the
    largest entry of a diagonal. A dense \(Q_k\) then turns towards a symmetric matrix by one
    Procrustes step: with \(R = Q^\top - Q\) over the bound of its spectral norm,

    \[ Q \leftarrow Q + a (R Q + \tfrac{a}{2} R R Q), \quad
       a = \min(\tfrac{1}{8}, -\mathrm{tr}(R Q) / \mathrm{tr}(R R Q)). \]

    At every 100th update, the factors of a row are scaled to equal largest entries. The direction
    is the momentum \(m \leftarrow \beta_t m + (1 - \beta_t) G\) with
    \(\beta_t = \min((t - 1) / t, \beta)\), times all \(P_k\), scaled down to a root mean square of
    at most 2, with entries between -10 and 10.

    The published code takes the largest \(\mathrm{mean}(G^4)\) of all tensors for the start, and
    balances at random. Here every row starts on its own, and each has its own noise, which depends
    on the row's seed and update: a resumed run repeats the bits.

    Args:
        init_scale: The scale s at the start; None for that from the first gradient. Default: None.
        damping: \(\delta\). Default: 1e-9.
        max_skew: With the structures "auto", an axis of length d is diagonal if
            \(d^2 > \text{max\_skew} \cdot D\). Default: 1.0.

    Source: Pooladzandi and Li 2024 (arXiv 2402.11858) and the official implementation
        (github.com/lixilinx/psgd_torch, `KronWhiten` with `dQ="Q0.5EQ1.5"`).
    """

    init_scale: float | None = None
    damping: float = 1e-9
    max_skew: float = 1.0

    structures = (DenseMatrix, DiagonalMatrix)
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "lr": nonnegative(1e-3),
        "momentum": fraction(0.9),
        "preconditioner_lr": nonnegative(0.1),
        "bound_beta": fraction(0.9),
        "weight_decay": nonnegative(0.0),
        "precondition_frequency": interval(1, operations=8.0),  # of four products
    }

    def __post_init__(self) -> None:
        if self.init_scale is not None:
            check_positive(init_scale=self.init_scale)
        check_positive(max_skew=self.max_skew)
        check_nonnegative(damping=self.damping)

    def auto_structures(self, dims: Sequence[int]) -> tuple[Structure, ...]:
        """Return `diagonal` for axes of length 1, and for those far longer than the others."""
        return tuple(
            DiagonalMatrix if dim <= 1 or dim > self.max_skew * others else DenseMatrix
            for dim, others in zip(dims, sizes_of_others(dims), strict=True)
        )

    def init(
        self, like: Tensor, structures: tuple[Structure, ...], dtypes: tuple[torch.dtype, ...]
    ) -> PSGDKronState:
        """Return identity factors, bounds of zero and a zero momentum."""
        axes = zip(structures, like.shape[1:], dtypes, strict=True)
        rows, device = like.shape[:1], like.device
        factors = tuple(
            None if cls is None else cls.eye(dim, rows, dtype=dtype, device=device)
            for cls, dim, dtype in axes
        )
        bounds = tuple(None if cls is None else like.new_zeros(rows) for cls in structures)
        return PSGDKronState(factors, bounds, torch.zeros_like(like))  # type: ignore[arg-type]

    def can_begin(self, state: PSGDKronState, grad: Tensor) -> Tensor | None:
        """Let rows wait whose gradient is zero, unless their scale is given."""
        return None if self.init_scale is not None else grad.flatten(1).any(1)

    def begin(
        self, state: PSGDKronState, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext
    ) -> bool:
        """Scale the factors to the first gradient."""
        own = [factor for factor in state.factors if factor is not None]
        if not own:
            return False
        scale: float | Tensor
        if self.init_scale is None:
            scale = entrywise_power(self._scale(grad), 1 / len(own))
        else:
            scale = self.init_scale ** (1 / len(own))
        for factor in own:
            factor.mul_(scale)
        return False

    def _scale(self, grad: Tensor) -> Tensor:
        rows = grad.flatten(1)
        # fourth powers of gradients leave the range of float32
        smallest = max(self.damping, torch.finfo(grad.dtype).tiny)
        largest = rows.abs().amax(1).clamp_(min=smallest)
        fourth = (rows / largest.unsqueeze(1)).square().square().mean(1)
        mean = fourth + (self.damping / largest).square().square()
        return entrywise_power(mean, -1 / 8) * largest**-0.5

    def update(
        self, state: PSGDKronState, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext
    ) -> Tensor:
        """Fit the factors of the rows that are due, then precondition the momentum."""
        if ctx.due is not None:
            damping = self.damping + torch.finfo(grad.dtype).eps * grad.abs()
            noisy = torch.addcmul(grad, damping, ctx.randn(*grad.shape[1:]))
            with rows_of(state, ctx.due) as part:
                self._fit(part, noisy[ctx.due], hp)
                self._balance(part, ctx.t if isinstance(ctx.t, int) else ctx.t[ctx.due])
        state.exp_avg.lerp_(grad, _share_of_gradient(ctx.t, hp["momentum"], grad))
        direction = _precondition(state.exp_avg, state.factors)
        # not the policy CapRMS: policies come after the update, and this one before the clamp
        direction = direction * factors_to_rms(_LARGEST_RMS, direction).clamp_(max=1.0)
        return direction.clamp_(-_LARGEST_ENTRY, _LARGEST_ENTRY)

    def _fit(self, state: PSGDKronState, noisy: Tensor, hp: Mapping[str, Any]) -> None:
        """Move the factors towards those that whiten a gradient."""
        whitened = _precondition(noisy, state.factors)
        size = prod(noisy.shape[1:])
        for axis, (stored, bound) in enumerate(zip(state.factors, state.bounds, strict=True)):
            if stored is None or bound is None:
                continue
            X, target = matricize(whitened, axis), size / noisy.shape[axis + 1]
            if isinstance(stored, DenseMatrix):
                Q = stored.mat.to(X.dtype)
                T = matmul(X, X.mT)
                rate = self._rate(bound, spectral_norm_bound(T) + target, hp)
                moved = matmul(T, Q).sub_(Q, alpha=target)
                Q = _turn_symmetric(Q - rate.view(-1, 1, 1) * moved)
                stored.mat.copy_(Q)
            else:
                T = X.square().sum(-1)
                rate = self._rate(bound, T.amax(-1) + target, hp)
                Q = stored.diag.to(X.dtype)
                stored.diag.copy_(Q - rate.unsqueeze(1) * (T - target) * Q)

    @staticmethod
    def _rate(bound: Tensor, curvature: Tensor, hp: Mapping[str, Any]) -> Tensor:
        """Update the bound of an axis, and return the step size of its factor."""
        bound.lerp_(curvature, 1 - hp["bound_beta"])
        torch.maximum(bound, curvature, out=bound)
        rate: Tensor = hp["preconditioner_lr"] / bound
        return rate

    @staticmethod
    def _balance(state: PSGDKronState, t: int | Tensor) -> None:
        """Scale the factors of a row to equal largest entries, at every 100th update t."""
        own = [factor for factor in state.factors if factor is not None]
        if len(own) < 2 or (isinstance(t, int) and t % _BALANCED_EVERY):
            return
        largest = torch.stack([_entries(Q).flatten(1).abs().amax(1) for Q in own])
        scales = largest.log().mean(0).exp() / largest
        if isinstance(t, Tensor):
            scales = torch.where((t % _BALANCED_EVERY == 0).to(scales.device), scales, 1.0)
        for Q, scale in zip(own, scales, strict=True):
            Q.mul_(scale)


def _entries(Q: DenseMatrix | DiagonalMatrix) -> Tensor:
    return Q.mat if isinstance(Q, DenseMatrix) else Q.diag


def _share_of_gradient(t: int | Tensor, momentum: float, like: Tensor) -> float | Tensor:
    """Return how much of the momentum the gradient of update t replaces."""
    if isinstance(t, int):
        return max(1 / t, 1 - momentum)
    return per_row(1 / t, like).clamp(min=1 - momentum).to(like.device, like.dtype)


def _precondition(tensor: Tensor, factors: Sequence[DenseMatrix | DiagonalMatrix | None]) -> Tensor:
    r"""Return a stack times all \(Q_k^\top Q_k\)."""
    return multiply_axes(multiply_axes(tensor, factors, "matmat"), factors, "rmatmat")


def _turn_symmetric(Q: Tensor) -> Tensor:
    """Return matrices `(b, n, n)` after one Procrustes step towards symmetric ones."""
    R = Q.mT - Q
    tiny = torch.finfo(Q.dtype).tiny
    R = R / (spectral_norm_bound(R) + tiny).view(-1, 1, 1)
    turned = matmul(R, Q)
    twice = matmul(R, turned)
    first, second = (X.diagonal(dim1=-2, dim2=-1).sum(-1) for X in (turned, twice))
    best = (-first / second).clamp(0, _LARGEST_TURN)
    a = torch.where(second < 0, best, _LARGEST_TURN).view(-1, 1, 1)
    return Q + a * (turned + a / 2 * twice)


class PSGDKron(StructuredOptimizer):
    """PSGD with Kronecker factors that whiten gradients (Li 2018, Pooladzandi and Li 2024).

    The update rule is documented at `PSGDKronStrategy`. Structures: `dense`, `diagonal`, `none`;
    "auto" is `diagonal` for axes whose square is larger than the tensor, such as those of vectors.

    Args:
        lr: Learning rate. Default: 1e-3.
        momentum: Decay of the momentum. Default: 0.9.
        preconditioner_lr: Step size of the factors, from 0 to 1. Default: 0.1.
        bound_beta: Decay of the bounds of the curvature. Default: 0.9.
        weight_decay: Decoupled weight decay. Default: 0.0.
        precondition_frequency: Interval of the factors' updates in steps, or a callable that
            returns whether to update at a global step. Default: 1.
        init_scale: Scale of the preconditioner at the start; None for that from the first gradient.
            Default: None.
        damping: Scale of the noise that keeps the factors finite. Default: 1e-9.
        max_skew: How much longer an axis with a dense factor may be than all others together.
            Default: 1.0.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = PSGDKron(model, lr=1e-2)
        >>> loss = model(torch.ones(16, 4)).square().mean()
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        preconditioner_lr: float = 0.1,
        bound_beta: float = 0.9,
        weight_decay: float = 0.0,
        precondition_frequency: int | Callable[[int], bool] = 1,
        init_scale: float | None = None,
        damping: float = 1e-9,
        max_skew: float = 1.0,
        **options: Unpack[FactorOptions],
    ) -> None:
        strategy, hp = from_keywords(PSGDKronStrategy, locals())
        super().__init__(model, params, strategy=strategy, hyperparameters=hp, **options)
