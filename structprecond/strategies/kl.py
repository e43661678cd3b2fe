"""KL-Shampoo and KL-SOAP: Kronecker factors that minimize a Kullback-Leibler divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from math import prod
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from structprecond.checks import check_flags, check_positive
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.options import FactorOptions, from_keywords
from structprecond.core.policies import CapRMS, Policy, per_row
from structprecond.core.refresh import refresh_rows
from structprecond.core.state import ALL_ROWS, Rows, State
from structprecond.core.strategy import (
    Hyperparameter,
    StepContext,
    nonnegative,
    pair_of_fractions,
)
from structprecond.linalg.powers import entrywise_power
from structprecond.strategies.moments import adam_direction, factor_decay, fraction_or_default
from structprecond.strategies.rotation import (
    RotatedFactors,
    RotatedStrategy,
    make_factors,
    overwrite,
    rotate,
    rotate_back,
)
from structprecond.structures import DiagonalMatrix
from structprecond.structures.mode_product import matricize
from structprecond.structures.spec import Structure


@dataclass
class KLState(State):
    """State of KL-Shampoo and KL-SOAP for a stack `(b, d1, ..., dN)`.

    Args:
        factors: The Kronecker factors `(b, dk, dk)`, None for an axis that is not rotated.
        bases: Their eigenbases, of the same shapes.
        eigenvalues: Moving averages of the eigenvalues `(b, dk)`, all that a diagonal factor
            stores; None for an axis without a factor.
        exp_avg: The first moment in the eigenbasis `(b, d1, ..., dN)`.
        exp_avg_sq: The second moment in the eigenbasis, of the same shape; None if not needed.
    """

    factors: RotatedFactors
    bases: RotatedFactors
    eigenvalues: tuple[Tensor | None, ...]
    exp_avg: Tensor
    exp_avg_sq: Tensor | None


@dataclass(frozen=True)
class KLShampooStrategy(RotatedStrategy):
    r"""The KL-Shampoo rule.

    Each factor \(S_k\) of size \(d_k\) has a basis \(Q_k\) and eigenvalues \(\lambda_k\). With
    \(D = \prod_k d_k\), the first gradient G that is not zero initializes

    \[ \lambda_k = \mathrm{mean}(G^2)^{1/N}, \quad
       S_k = (1 - \beta_s) \frac{d_k}{D} \frac{G_{(k)} G_{(k)}^\top}{\prod_{j \ne k} \lambda_j} \]

    and \(Q_k\) as the eigenbasis of \(S_k\). Then, with
    \(G' = G \times_1 Q_1^\top \dots \times_N Q_N^\top\),

    \[ m \leftarrow \beta_1 m + (1 - \beta_1) G', \quad
       w = \prod_k \lambda_k^{-1/2}, \quad
       U = \left( m \circ \frac{w}{1 + \epsilon w} \right) \times_1 Q_1 \dots \times_N Q_N, \]
    \[ X_k = G' \times_{j \ne k} \mathrm{diag}(\lambda_j)^{-1/2}, \quad
       S_k \leftarrow \beta_s S_k + (1 - \beta_s) \frac{d_k}{D}
       Q_k X_{k,(k)} X_{k,(k)}^\top Q_k^\top, \]
    \[ \lambda_k \leftarrow \beta_s \lambda_k + (1 - \beta_s) \frac{d_k}{D} \mathrm{diag}(X_{k,(k)}
       X_{k,(k)}^\top), \]

    \(p \leftarrow p - \eta U\), \(p \leftarrow p - \eta \lambda p\). Whenever
    `precondition_frequency` divides the step, \(Q_k \leftarrow \mathrm{qr}(S_k Q_k)\), except for
    null columns (`structprecond.linalg.improve_eigenbasis`).

    All factors are updated from the values before the step. The published code does so for two
    axes. For three, it updates \(\lambda_3\) first, then \(\lambda_2\) with the new \(\lambda_3\),
    and \(S_1\) and \(\lambda_1\) with the old \(\lambda_3\) and the new \(\lambda_2\).

    A unit without factors, by default a vector, follows AdamW from its first step on.

    The published start is \(\lambda_k = 0.1\) and \(S_k\) without the division. Gradients have root
    mean squares of 1e-4 to 1e-2 in most models, for which this makes the first hundreds of steps
    gradient descent with tiny steps. By default, directions with a root mean square above 1 are
    scaled down (`CapRMS`), so that a gradient that outgrows the eigenvalues makes no huge step. The
    published rule is `init_factor=0.1, shampoo_beta=-1, policies=()`.

    Args:
        init_factor: The initial eigenvalues as published; None for those from the first gradient.
            Default: None.
        nesterov: Whether \(\beta_1 m + (1 - \beta_1) G'\) takes the place of m in U, which is not
            published. Default: False.
        clamping: Whether to clamp \(\lambda_k\) to at least \(c_k^{-2}\) after each update, with
            \(c_k = \max(10, \min(d_k, 4000))\). The initial value is not clamped. Default: True.

    Source: Lin et al. 2025 (arXiv 2509.03378) and its official implementation.
    """

    init_factor: float | None = None
    nesterov: bool = False
    clamping: bool = True

    policies: ClassVar[tuple[Policy, ...]] = (CapRMS(1.0),)
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "lr": nonnegative(1e-4),
        "betas": pair_of_fractions((0.9, 0.98)),
        "shampoo_beta": fraction_or_default(0.95),
        "eps": nonnegative(1e-8),
        "weight_decay": nonnegative(0.01),
        **RotatedStrategy.hyperparameters,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(clamping=self.clamping, nesterov=self.nesterov)
        if self.init_factor is not None:
            check_positive(init_factor=self.init_factor)

    def auto_structures(self, dims: Sequence[int]) -> tuple[Structure, ...]:
        """Return `dense`, and `diagonal` for axes that other strategies leave without a factor.

        Nothing else scales the directions along such an axis, whose entries may differ in scale:
        rows of rare and of frequent tokens. KL-SOAP has second moments for that.
        """
        usual = super().auto_structures(dims)
        if self._keeps_second_moment() or not any(usual):
            return usual
        return tuple(DiagonalMatrix if structure is None else structure for structure in usual)

    def init(
        self, like: Tensor, structures: tuple[Structure, ...], dtypes: tuple[torch.dtype, ...]
    ) -> KLState:
        """Return zero factors, identity bases, equal eigenvalues and zero moments."""
        eigenvalues = tuple(
            None if s is None else like.new_full((like.shape[0], dim), self.init_factor or 0.0)
            for s, dim in zip(structures, like.shape[1:], strict=True)
        )
        needs_square = self._keeps_second_moment() or not any(structures)
        return KLState(
            *make_factors(like, structures, dtypes),
            eigenvalues,
            torch.zeros_like(like),
            torch.zeros_like(like) if needs_square else None,
        )

    def _keeps_second_moment(self) -> bool:
        return False

    def can_begin(self, state: KLState, grad: Tensor) -> Tensor | None:
        """Let rows wait whose gradient is zero, unless they start as published or follow AdamW."""
        if self.init_factor is not None or all(values is None for values in state.eigenvalues):
            return None
        return _mean_square(grad) >= torch.finfo(grad.dtype).tiny

    def begin(self, state: KLState, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext) -> bool:
        """Initialize the factors, their eigenbases and eigenvalues from the first gradient."""
        own = [values for values in state.eigenvalues if values is not None]
        whitened = grad
        if self.init_factor is None and own:
            start = entrywise_power(_mean_square(grad), 1 / len(own))
            for values in own:
                values.copy_(start.unsqueeze(1).expand_as(values))
            whitened = grad * per_row(entrywise_power(start, (1 - len(own)) / 2), grad)
        for axis, factor in enumerate(state.factors):
            if factor is not None:
                X = matricize(whitened, axis) * _per_column(grad, axis)
                factor.add_inner_(X, factor_decay(hp), 1 - factor_decay(hp))
        refresh_rows(partial(self._find_bases, grad), state, ALL_ROWS, ctx)
        return bool(own)

    def update(
        self, state: KLState, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext
    ) -> Tensor:
        """Update moments and factors, refresh the rows that are due, return the directions."""
        if all(values is None for values in state.eigenvalues):
            return self._adamw(state, grad, hp, ctx)
        rotated = rotate(grad, state.bases)
        roots = [self._inverse_roots(values) for values in state.eigenvalues]
        direction = rotate_back(self._direction(state, rotated, roots, hp), state.bases)
        self._accumulate(state, rotated, roots, factor_decay(hp))
        self._refresh_stale(state, hp, ctx)
        return direction

    def _direction(
        self,
        state: KLState,
        rotated: Tensor,
        roots: Sequence[Tensor | None],
        hp: Mapping[str, Any],
    ) -> Tensor:
        """Average the rotated gradient and return the direction in the eigenbasis."""
        beta = hp["betas"][0]
        average = state.exp_avg.lerp_(rotated, 1 - beta)
        if self.nesterov:
            average = rotated.lerp(average, beta)
        weight = _product(
            _along(root, rotated, axis) for axis, root in enumerate(roots) if root is not None
        )
        direction: Tensor = weight / (1 + hp["eps"] * weight) * average
        return direction

    def _inverse_roots(self, eigenvalues: Tensor | None) -> Tensor | None:
        if eigenvalues is None:
            return None
        return eigenvalues.rsqrt().nan_to_num_(nan=0.0, posinf=0.0)

    def _accumulate(
        self, state: KLState, rotated: Tensor, roots: Sequence[Tensor | None], decay: float
    ) -> None:
        for axis, eigenvalues in enumerate(state.eigenvalues):
            if eigenvalues is None:
                continue
            others = [
                _along(root, rotated, other)
                for other, root in enumerate(roots)
                if root is not None and other != axis
            ]
            scale = _per_column(rotated, axis)
            whitened = rotated * (_product(others) * scale if others else scale)
            X = matricize(whitened, axis)
            eigenvalues.lerp_(X.square().sum(-1), 1 - decay)
            if self.clamping:
                eigenvalues.clamp_(min=_smallest_eigenvalue(eigenvalues.shape[-1]))
            factor, basis = state.factors[axis], state.bases[axis]
            if factor is not None and basis is not None:
                factor.add_inner_(basis.to(X.dtype).matmat(X), decay, 1 - decay)

    def _refresh(self, state: KLState, rows: Rows) -> None:
        """Refresh the eigenbases and rotate the first moment into them."""
        better = [
            None if S is None or Q is None else S.orthogonal_iteration(Q.to(S.dtype))
            for S, Q in zip(state.factors, state.bases, strict=True)
        ]
        exp_avg = rotate_back(state.exp_avg, state.bases)
        overwrite(state.bases, better)
        state.exp_avg.copy_(rotate(exp_avg, state.bases))

    @staticmethod
    def _adamw(state: KLState, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext) -> Tensor:
        assert state.exp_avg_sq is not None
        direction = adam_direction(
            state.exp_avg, state.exp_avg_sq, grad, hp["betas"], hp["eps"], ctx
        )
        # AdamW decays before its update, the core after it
        undone: Tensor = direction / (1 - hp["lr"] * hp["weight_decay"])
        return undone


@dataclass(frozen=True)
class KLSOAPStrategy(KLShampooStrategy):
    r"""The KL-SOAP rule: KL-Shampoo's factors, and Adam without bias correction in their bases.

    With the rotated gradient \(G'\), \(v \leftarrow \beta_2 v + (1 - \beta_2) G'^2\), and the
    direction in the bases is \(m / (\sqrt v + \epsilon)\). All else is as in `KLShampooStrategy`.

    Source: Lin et al. 2025 (arXiv 2509.03378) and its official implementation.
    """

    def _keeps_second_moment(self) -> bool:
        return True

    def _direction(
        self,
        state: KLState,
        rotated: Tensor,
        roots: Sequence[Tensor | None],
        hp: Mapping[str, Any],
    ) -> Tensor:
        assert state.exp_avg_sq is not None
        moments = state.exp_avg, state.exp_avg_sq
        return adam_direction(*moments, rotated, hp["betas"], hp["eps"], None, self.nesterov)


def _mean_square(stack: Tensor) -> Tensor:
    """Return the mean square of each row `(b,)`."""
    return stack.flatten(1).square().mean(1)


def _smallest_eigenvalue(dim: int) -> float:
    """Return the lower bound of clamped eigenvalues for a factor of size `dim`."""
    return 1.0 / max(10, min(dim, 4000)) ** 2


def _per_column(stack: Tensor, axis: int) -> float:
    """Return the scale that makes the inner product of a matricization a mean over its columns."""
    dims = stack.shape[1:]
    return float((dims[axis] / prod(dims)) ** 0.5)


def _product(tensors: Iterable[Tensor]) -> Tensor:
    """Return the product of tensors that broadcast to one shape."""
    return reduce(torch.mul, tensors)


def _along(vectors: Tensor, stack: Tensor, axis: int) -> Tensor:
    """Reshape one vector per row `(b, d_axis)` to broadcast along an axis of a stack."""
    shape = [1] * stack.ndim
    shape[0], shape[axis + 1] = vectors.shape
    return vectors.view(shape)


class KLShampoo(StructuredOptimizer):
    """KL-Shampoo (Lin et al. 2025, arXiv 2509.03378).

    The update rule is documented at `KLShampooStrategy`. Structures: `dense`, `diagonal`,
    `block<k>diagonal`, `none`; "auto" means `diagonal` on axes that are too long for `dense`.

    Args:
        lr: Learning rate. Default: 1e-4.
        betas: Decay of the first and the second moment. Default: (0.9, 0.98).
        shampoo_beta: Decay of the factors; negative for `betas[1]`, as published. Default: 0.95.
        eps: Keeps the inverse roots finite. Default: 1e-8.
        weight_decay: Decoupled weight decay. Default: 0.01.
        precondition_frequency: Refresh interval of the bases in steps, or a callable that returns
            whether to refresh at a global step. Default: 10.
        refresh_tolerance: Off-diagonal ratio up to which bases are not refreshed. Default: 0.0.
        init_factor: Initial eigenvalues of the factors, 0.1 as published; None for those from the
            first gradient. Default: None.
        nesterov: Whether to use Nesterov momentum. Default: False.
        clamping: Whether eigenvalues have a lower bound. Default: True.
        max_precond_dim: Axes longer than this get no factor. Default: 10000.
        precondition_1d: Whether vectors get a factor; else they follow AdamW. Default: False.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> optimizer = KLShampoo(model, lr=1e-3)
        >>> for _ in range(2):
        ...     loss = model(torch.ones(16, 4)).square().mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
    """

    STRATEGY: ClassVar[type[KLShampooStrategy]] = KLShampooStrategy

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int | Callable[[int], bool] = 10,
        refresh_tolerance: float = 0.0,
        init_factor: float | None = None,
        nesterov: bool = False,
        clamping: bool = True,
        max_precond_dim: int = 10000,
        precondition_1d: bool = False,
        **options: Unpack[FactorOptions],
    ) -> None:
        strategy, hp = from_keywords(self.STRATEGY, locals())
        super().__init__(model, params, strategy=strategy, hyperparameters=hp, **options)


class KLSOAP(KLShampoo):
    """KL-SOAP (Lin et al. 2025, arXiv 2509.03378): Adam in the eigenbases of KL-Shampoo's factors.

    The update rule is documented at `KLSOAPStrategy`.

    Args:
        lr: Learning rate. Default: 1e-4.

    Example:
        >>> optimizer = KLSOAP(nn.Linear(4, 3), lr=1e-3, precondition_frequency=5)
    """

    STRATEGY = KLSOAPStrategy
