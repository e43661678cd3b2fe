"""Scion: steps of unit length, in a norm that suits each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn

from structprecond.checks import check_choice, check_positive
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.options import CommonOptions, from_keywords
from structprecond.core.routing import Routing
from structprecond.core.strategy import Hyperparameter, Strategy, fraction, nonnegative
from structprecond.linalg.polar import (
    CoefficientType,
    MatmulPrecision,
    checked_coefficients,
    newton_schulz,
)
from structprecond.roles import NOT_MATRICES, RoleName
from structprecond.strategies.orthogonalized import OrthogonalizedMomentumStrategy

Norm = Literal["spectral", "sign", "row", "rms"]


def _unit(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Divide by the 2-norm over some dimensions; zero stays zero."""
    # scaled by the largest entry first, so that no square overflows or underflows
    tiny = torch.finfo(tensor.dtype).tiny
    tensor = tensor / tensor.abs().amax(dims, keepdim=True).clamp_(min=tiny)
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
    return tensor.div_(norm.clamp_(min=tiny))


# the linear minimization oracle (lmo) of each norm, on stacks (b, out, in)
_UNIT_STEPS: Mapping[Norm, Callable[[Tensor], Tensor]] = {
    "sign": lambda u: u.sign() / u.shape[-1],
    "row": lambda u: _unit(u, (-1,)) * u.shape[-1] ** 0.5,
    "rms": lambda u: _unit(u, (-2, -1)) * u[0].numel() ** 0.5,
}


@dataclass(frozen=True)
class ScionStrategy(OrthogonalizedMomentumStrategy):
    r"""The Scion rule: the steepest step of unit norm for the momentum, times a radius.

    \[ m \leftarrow \mu m + (1 - \mu) g, \quad p \leftarrow (1 - \eta \lambda) p - \eta \rho \,
       \mathrm{lmo}(m). \]

    With weight decay \(\lambda = 1\), parameters stay in the ball of radius \(\rho\) (constrained
    Scion); with 0 they do not. For a matrix `(out, in)`, the unit step of each norm is

    - "spectral", the operator norm between root mean squares: \(\sqrt{out / in} \, U V^\top\) by
      Newton-Schulz iterations, for hidden layers,
    - "sign", from root mean squares to the largest entry: \(\mathrm{sign}(m) / in\), for heads,
    - "row": rows of root mean square 1, for embeddings, where each row is a token,
    - "rms": a root mean square of 1, for biases and the scales of norms.

    Args:
        norm: One of the four above. Default: "spectral".
        radius: \(\rho\). Default: 1.0.
        coefficient_type: As in `linalg.newton_schulz`. Default: "quintic".
        num_ns_steps: The number of Newton-Schulz steps. Default: 5.
        fp32_matmul_prec: The precision of products, as in `MuonStrategy`. Default: "medium".

    Raises:
        StructPrecondError: If an argument is not allowed.

    Source: Pethick et al. 2025 (arXiv 2502.07529), algorithms 1 and 2, and its table of norms.
    """

    norm: Norm = "spectral"
    radius: float = 1.0
    coefficient_type: CoefficientType = "quintic"
    num_ns_steps: int = 5
    fp32_matmul_prec: MatmulPrecision = "medium"

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "lr": nonnegative(3.6e-4),
        "momentum": fraction(0.9),
        "weight_decay": nonnegative(0.0),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("norm", self.norm, Norm)
        check_choice("fp32_matmul_prec", self.fp32_matmul_prec, MatmulPrecision)
        check_positive(radius=self.radius)
        kind = checked_coefficients(self.coefficient_type, self.num_ns_steps)
        object.__setattr__(self, "coefficient_type", kind)

    def scaled_orthogonalize_fn(self, update: Tensor) -> Tensor:
        """Return the unit steps times the radius `(b, out, in)`."""
        if self.norm != "spectral":
            return _UNIT_STEPS[self.norm](update).mul_(self.radius)
        rows, columns = update.shape[1:]
        polar = newton_schulz(
            update, self.num_ns_steps, self.coefficient_type, self.fp32_matmul_prec
        )
        return polar.mul_(self.radius * (rows / columns) ** 0.5)


class Scion(StructuredOptimizer):
    """Scion: steps of unit length, in a norm that suits each layer (Pethick et al. 2025).

    The norm depends on the role (see `infer_roles`): "spectral" for hidden matrices and routers,
    "sign" for heads, "row" for embeddings, and "rms" for vectors and depthwise convolutions. The
    update rule is documented at `ScionStrategy`.

    Args:
        lr: Learning rate. Default: 3.6e-4.
        momentum: Decay of the momentum. Default: 0.9.
        weight_decay: Decoupled weight decay; 1.0 keeps parameters within the radius. Default: 0.0.
        radius: The size of all steps except those of heads. Default: 50.0.
        head_radius: The size of the steps of heads, also tied ones. Default: 3000.0.
        coefficient_type: As in `Muon`. Default: "quintic".
        num_ns_steps: As in `Muon`. Default: 5.
        fp32_matmul_prec: As in `Muon`. Default: "medium".

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = Scion(model, lr=1e-3)
        >>> model(torch.ones(16, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 3.6e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        radius: float = 50.0,
        head_radius: float = 3000.0,
        coefficient_type: CoefficientType = "quintic",
        num_ns_steps: int = 5,
        fp32_matmul_prec: MatmulPrecision = "medium",
        **options: Unpack[CommonOptions],
    ) -> None:
        spectral, hp = from_keywords(ScionStrategy, locals())
        vectors = ScionStrategy(norm="rms", radius=radius)
        others = [role for role in NOT_MATRICES if role != "router"]
        roles: dict[RoleName, Strategy[Any]] = dict.fromkeys(others, vectors)
        roles["embedding"] = ScionStrategy(norm="row", radius=radius)
        roles["head"] = ScionStrategy(norm="sign", radius=head_radius)
        super().__init__(
            model,
            params,
            strategy=Routing(spectral, roles=roles),
            hyperparameters=hp,
            **options,
        )
