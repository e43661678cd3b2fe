"""SOAP-Muon: the polar factor of a momentum that is whitened in eigenbases of Kronecker factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Unpack

from torch import Tensor, nn

from structprecond.checks import check_choice
from structprecond.core.options import from_keywords
from structprecond.core.policies import MatchRMS, Policy
from structprecond.core.strategy import Hyperparameter, pair_of_fractions
from structprecond.groups import Matricize, PreconditionerGroup, StackExperts
from structprecond.linalg.polar import (
    CoefficientType,
    MatmulPrecision,
    checked_coefficients,
    newton_schulz,
)
from structprecond.strategies.auxiliary import FactoredAuxiliaryOptions, WithAdamW
from structprecond.strategies.kl import KLShampooStrategy, KLState
from structprecond.strategies.moments import fraction_or_default
from structprecond.strategies.soap import SOAPState, SOAPStrategy

Whitening = Literal["soap", "kl"]


@dataclass(frozen=True)
class Polar:
    """The part that takes polar factors.

    Args:
        coefficient_type: As in `linalg.newton_schulz`. Default: "polar_express".
        num_ns_steps: The number of Newton-Schulz steps. Default: 5.
        fp32_matmul_prec: The precision of their products, as in `MuonStrategy`. Default: "medium".
    """

    coefficient_type: CoefficientType = "polar_express"
    num_ns_steps: int = 5
    fp32_matmul_prec: MatmulPrecision = "medium"

    policies: ClassVar[tuple[Policy, ...]] = (MatchRMS(0.2),)
    combine_params: ClassVar[tuple[PreconditionerGroup, ...]] = (StackExperts(), Matricize())
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        **SOAPStrategy.hyperparameters,
        "betas": pair_of_fractions((0.9, 0.95)),
        "shampoo_beta": fraction_or_default(0.9),
    }

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        check_choice("fp32_matmul_prec", self.fp32_matmul_prec, MatmulPrecision)
        kind = checked_coefficients(self.coefficient_type, self.num_ns_steps)
        object.__setattr__(self, "coefficient_type", kind)

    def polar(self, stack: Tensor) -> Tensor:
        """Return the polar factors of the matrices `(out, rest)` in a stack; a vector is a row."""
        matrices = stack.flatten(2) if stack.ndim > 2 else stack.unsqueeze(1)
        steps = self.num_ns_steps, self.coefficient_type, self.fp32_matmul_prec
        return newton_schulz(matrices, *steps).reshape(stack.shape)


@dataclass(frozen=True)
class SOAPMuonStrategy(Polar, SOAPStrategy):
    r"""SOAP with polar factors: Muon whose momentum is whitened by Adam in SOAP's eigenbases.

    With the factors, bases and moments of `SOAPStrategy`, the direction in the eigenbases is

    \[ D' = \mathrm{NewtonSchulz} \left( \frac{\beta_1 m + (1 - \beta_1) G'}{\sqrt v + \epsilon}
       \right), \]

    rotated back, and scaled to a root mean square of 0.2 by the default policy, `MatchRMS(0.2)`.
    Without the division, it would be Muon's: polar factors commute with rotations.

    Args:
        nesterov: Whether the momentum is Nesterov's, as in the formula, or m. Default: True.

    Source: the records of "SOAP-Muon" in github.com/KellerJordan/modded-nanogpt.
    """

    nesterov: bool = True

    def _whiten(self, state: SOAPState, rotated: Tensor, hp: Mapping[str, Any]) -> Tensor:
        return self.polar(super()._whiten(state, rotated, hp))


@dataclass(frozen=True)
class KLMuonStrategy(Polar, KLShampooStrategy):
    r"""KL-Shampoo with polar factors: Muon whose momentum is whitened by KL-Shampoo's factors.

    As `SOAPMuonStrategy`, with the whitened momentum of `KLShampooStrategy`. Here too, a unit
    without factors follows AdamW.

    Args:
        nesterov: Whether to use Nesterov momentum. Default: True.
    """

    nesterov: bool = True

    def _direction(
        self,
        state: KLState,
        rotated: Tensor,
        roots: Sequence[Tensor | None],
        hp: Mapping[str, Any],
    ) -> Tensor:
        return self.polar(super()._direction(state, rotated, roots, hp))


class SOAPMuon(WithAdamW):
    """SOAP-Muon for hidden matrices, and AdamW for all other parameters.

    Muon orthogonalizes the momentum; SOAP-Muon whitens it first, by Adam's second moment in SOAP's
    eigenbases (`SOAPMuonStrategy`) or by the factors of KL-Shampoo (`KLMuonStrategy`). Parameters
    are routed as in `Muon`. Directions have a root mean square of 0.2, unless `policies` says
    otherwise, so one learning rate suits both strategies. Structures: `dense`, `diagonal`,
    `block<k>diagonal`, `none`.

    Args:
        lr: Learning rate. Default: 3e-3.
        whitening: "soap" or "kl". Default: "soap".
        betas: Decay of the first and the second moment. Default: (0.9, 0.95).
        shampoo_beta: Decay of the factors; negative for `betas[1]`. Default: 0.9.
        eps: Added to the root of the second moment. Default: 1e-8.
        weight_decay: Decoupled weight decay of hidden matrices. Default: 0.01.
        precondition_frequency: Refresh interval of the bases in steps, or a callable that returns
            whether to refresh at a global step. Default: 10.
        refresh_tolerance: Off-diagonal ratio up to which bases are not refreshed. Default: 0.0.
        max_precond_dim: Axes longer than this are not rotated. Default: 10000.
        nesterov: Whether to use Nesterov momentum. Default: True.
        coefficient_type: As in `Muon`. Default: "polar_express".
        num_ns_steps: As in `Muon`. Default: 5.
        fp32_matmul_prec: As in `Muon`. Default: "medium".

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = SOAPMuon(model, lr=1e-2)
        >>> for _ in range(2):
        ...     loss = model(torch.ones(16, 4)).square().mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 3e-3,
        whitening: Whitening = "soap",
        betas: tuple[float, float] = (0.9, 0.95),
        shampoo_beta: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int | Callable[[int], bool] = 10,
        refresh_tolerance: float = 0.0,
        max_precond_dim: int = 10000,
        nesterov: bool = True,
        coefficient_type: CoefficientType = "polar_express",
        num_ns_steps: int = 5,
        fp32_matmul_prec: MatmulPrecision = "medium",
        **options: Unpack[FactoredAuxiliaryOptions],
    ) -> None:
        check_choice("whitening", whitening, Whitening)
        kind = KLMuonStrategy if whitening == "kl" else SOAPMuonStrategy
        strategy, hp = from_keywords(kind, locals())
        super().__init__(model, params, strategy=strategy, hyperparameters=hp, **options)
