"""Polar factors of stacks: by Newton-Schulz iterations, or exactly by singular values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from structprecond.checks import as_number, is_count
from structprecond.errors import StructPrecondError
from structprecond.linalg.precision import (
    at_least_float32,
    full_precision,
    has_native_bfloat16,
    reduced_precision,
)
from structprecond.linalg.product import as_stack, matmul
from structprecond.linalg.symmetric import baddbmm_commuting, baddgram

Coefficients: TypeAlias = tuple[float, float, float]
"""The polynomial \\(aX + bX^3 + cX^5\\) of one step."""

CoefficientType: TypeAlias = (
    Literal["simple", "quintic", "polar_express", "cans", "aol", "cubic5"] | Sequence[Coefficients]
)
MatmulPrecision: TypeAlias = Literal["highest", "high", "medium"]

# Steps between restarts of the Gram form. Without restarts, errors of R = XX' grow to 1e-3 in 5
# steps, 1e-1 in 8 (Polar Express). The first segment is shorter: singular values change most there.
_FIRST_SEGMENT, _SEGMENT = 3, 4
_MOST_STEPS = 1000


class _Table(NamedTuple):
    """Published coefficients, and how they continue after the last; None if they do not."""

    steps: tuple[Coefficients, ...]
    then: Literal["cycle", "repeat last"] | None
    fewest: int = 1


COEFFICIENTS: Mapping[str, _Table] = {
    # Jordan et al. 2024 (kellerjordan.github.io/posts/muon)
    "simple": _Table(((3.4445, -4.7750, 2.0315),), "cycle"),
    "quintic": _Table(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        "cycle",
    ),
    # Amsel et al. 2025 (arXiv 2505.16932)
    "polar_express": _Table(
        (
            (8.2051, -22.9019, 16.4607),
            (4.0664, -2.8612, 0.5184),
            (3.9096, -2.8234, 0.5250),
            (3.2856, -2.4153, 0.4853),
            (2.2779, -1.6198, 0.3985),
            (1.8726, -1.2307, 0.3585),
            (1.8564, -1.2132, 0.3568),
            (1.8750, -1.2500, 0.3750),
        ),
        "repeat last",
    ),
    # Grishina et al. 2025 (arXiv 2506.10935)
    "cans": _Table(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        "repeat last",
    ),
    "aol": _Table(
        (
            (4.0098, -7.0585, 2.4635),
            (3.4585, -5.5479, 2.5959),
            (2.7573, -3.2939, 1.4254),
            (2.7215, -3.0494, 1.3169),
        ),
        None,
    ),
    "cubic5": _Table(
        (
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ),
        None,
        fewest=5,
    ),
}
"""The coefficients of the published Newton-Schulz iterations, by name."""


def coefficients_of(kind: CoefficientType, steps: int) -> tuple[Coefficients, ...]:
    """Return the coefficients of each step.

    Args:
        kind: A name of `COEFFICIENTS`, or one triple per step.
        steps: The number of steps, from 1 to 1000.

    Raises:
        StructPrecondError: If the name is unknown, or the coefficients do not fit the steps.

    Example:
        >>> coefficients_of("simple", 2)
        ((3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315))
    """
    if isinstance(steps, int) and steps > _MOST_STEPS:
        raise StructPrecondError(
            f"The number of Newton-Schulz steps must be at most {_MOST_STEPS}, got {steps}. A few "
            "are enough; polar_factor is exact."
        )
    if not is_count(steps):
        raise StructPrecondError(
            f"The number of Newton-Schulz steps must be an integer of at least 1, got {steps!r}."
        )
    if not isinstance(kind, str):
        return _custom(kind, steps)
    if kind not in COEFFICIENTS:
        raise StructPrecondError(
            f"Unknown Newton-Schulz coefficients {kind!r}. Use {', '.join(COEFFICIENTS)}, or a "
            "list with one triple (a, b, c) per step."
        )
    table = COEFFICIENTS[kind]
    known = len(table.steps)
    if steps < table.fewest or (table.then is None and steps > known):
        wanted = f"exactly {known}" if table.fewest == known else f"at most {known}"
        raise StructPrecondError(
            f"The coefficients {kind!r} are made for {wanted} steps, got {steps}."
        )
    if table.then == "cycle":
        return tuple(table.steps[i % known] for i in range(steps))
    return tuple(table.steps[min(i, known - 1)] for i in range(steps))


def checked_coefficients(kind: CoefficientType, steps: int) -> CoefficientType:
    """Check coefficients as `coefficients_of` does, and return them in a hashable form."""
    polynomials = coefficients_of(kind, steps)
    return kind if isinstance(kind, str) else polynomials


def _custom(kind: Sequence[Coefficients], steps: int) -> tuple[Coefficients, ...]:
    try:
        triples = tuple((as_number(a), as_number(b), as_number(c)) for a, b, c in kind)
        fine = all(math.isfinite(number) for triple in triples for number in triple)
    except (TypeError, ValueError, ArithmeticError):
        triples, fine = (), False
    if not fine:
        raise StructPrecondError(
            f"Newton-Schulz coefficients must be a name ({', '.join(COEFFICIENTS)}) or a list of "
            f"triples (a, b, c) of finite numbers, got {kind!r}."
        )
    if len(triples) != steps:
        raise StructPrecondError(
            f"Got {len(triples)} triples of Newton-Schulz coefficients for {steps} steps. Give "
            "one triple per step."
        )
    return triples


@torch.no_grad()
def newton_schulz(
    matrix: Tensor,  # (*b, m, n)
    steps: int = 5,
    coefficients: CoefficientType = "quintic",
    precision: MatmulPrecision = "highest",
) -> Tensor:  # (*b, m, n)
    r"""Approximate the polar factor \(U V^\top\) of each matrix \(U \Sigma V^\top\) in a stack.

    \[ X \leftarrow M / \|M\|_F, \quad
       X \leftarrow a X + (b A + c A^2) X, \; A = X X^\top \quad \text{for each step}, \]

    on the transpose if M is tall. Zero stays zero. Unlike the published rule, which divides by at
    least \(10^{-15}\), the result does not depend on the scale of M. A few steps do not bring
    singular values far below \(\|M\|_F\) to 1. For long matrices, fewer operations are needed to
    apply the polynomials to \(R = X X^\top\) and restore X every few steps (the Gram form).

    Args:
        matrix: The stack M, of any scale. Half precision is computed in float32.
        steps: The number of steps. Default: 5.
        coefficients: A name of `COEFFICIENTS` or one triple (a, b, c) per step: "simple" and
            "quintic" reach singular values from 0.7 to 1.2 in 5 steps, "polar_express" and "cans"
            converge with more of them. Default: "quintic".
        precision: How float32 input is multiplied: in float32 ("highest"), in TF32 on accelerators
            that have it ("high"), or in bfloat16 where it is native ("medium"), else in float32.
            Default: "highest".

    Returns:
        The approximations, in the dtype of the input.

    Raises:
        StructPrecondError: If the input is no stack of matrices, or an argument is not allowed.

    Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the Gram form follows from
        \(R \leftarrow P R P, \; Q \leftarrow P Q\) with \(P = aI + bR + cR^2\).

    Example:
        >>> X = newton_schulz(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), 8, "polar_express")
        >>> (X - torch.eye(2)).abs().max() < 1e-3
        tensor(True)
    """
    if matrix.ndim < 2 or not matrix.is_floating_point():
        raise StructPrecondError(
            f"newton_schulz takes stacks (*b, m, n) of real matrices, got a tensor of shape "
            f"{tuple(matrix.shape)} and {matrix.dtype}."
        )
    if precision not in ("highest", "high", "medium"):
        raise StructPrecondError(
            f"precision must be 'highest', 'high' or 'medium', got {precision!r}."
        )
    polynomials = coefficients_of(coefficients, steps)
    if not matrix.numel():
        return matrix.clone()
    X = _normalized(at_least_float32(matrix))
    if X.shape[-2] > X.shape[-1]:
        return _iterate(X.mT, polynomials, precision).mT.to(matrix.dtype)
    return _iterate(X, polynomials, precision).to(matrix.dtype)


def _normalized(matrix: Tensor) -> Tensor:
    """Divide by the Frobenius norm, also where its square overflows or underflows."""
    if matrix.device.type == "cpu":
        norm: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)
        smallest = torch.finfo(matrix.dtype).tiny ** 0.25
        if bool(((norm > smallest) & (norm < torch.inf)).all()):
            return matrix / norm
    # without a host-device sync
    X = _scaled(matrix)
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    return X.div_(torch.where(norm > 0, norm, 1.0))


def _scaled(matrix: Tensor) -> Tensor:
    """Divide by the largest absolute entry, so that squares and sums stay in range."""
    largest = matrix.abs().amax((-2, -1), keepdim=True)
    return matrix / torch.where(largest > 0, largest, 1.0)


def _iterate(X: Tensor, polynomials: Sequence[Coefficients], precision: MatmulPrecision) -> Tensor:
    """Apply the polynomials to a stack of wide matrices."""
    stack = as_stack(X)
    if precision == "medium" and X.dtype == torch.float32 and has_native_bfloat16(X.device):
        return _standard(stack.bfloat16(), polynomials).to(X.dtype).view(X.shape)
    if precision != "highest" and X.dtype == torch.float32 and X.device.type != "cpu":
        with reduced_precision():
            return _standard(stack, polynomials).view(X.shape)
    # only in full precision: the Gram form squares the condition number
    run = _gram if _gram_saves(stack.shape[1], stack.shape[2], len(polynomials)) else _standard
    with full_precision():
        return run(stack, polynomials).view(X.shape)


def _standard(X: Tensor, polynomials: Sequence[Coefficients]) -> Tensor:
    """Apply the polynomials and overwrite X, a transposed view if the matrices are tall."""
    A = X.new_empty(*X.shape[:-1], X.shape[-2])
    P = torch.empty_like(A)
    tall = not X.is_contiguous()
    free = torch.empty_like(X.mT if tall else X)
    for a, b, c in polynomials:
        baddgram(A, X, beta=0, alpha=1, out=A)
        # sums inside the products are not rounded to bfloat16
        baddbmm_commuting(A, A, A, beta=b, alpha=c, out=P)
        if tall:
            torch.baddbmm(X.mT, X.mT, P, beta=a, out=free)
            X, free = free.mT, X.mT
        else:
            torch.baddbmm(X, P, X, beta=a, out=free)
            X, free = free, X
    return X


def _segments(steps: int) -> list[int]:
    """Return the numbers of steps between restarts of the Gram form."""
    lengths = [min(steps, _FIRST_SEGMENT)]
    while (rest := steps - sum(lengths)) > 0:
        lengths.append(min(rest, _SEGMENT))
    return lengths


def _gram_saves(rows: int, columns: int, steps: int) -> bool:
    """Return whether the products of the Gram form take fewer operations."""
    segments = _segments(steps)
    # in multiples of rows^2: P and Q once per step, R twice; no Q in the first, no R in the last
    gram = sum((4 * k - 3) * rows + 2 * columns for k in segments)
    return gram < steps * (2 * columns + rows)


def _gram(X: Tensor, polynomials: Sequence[Coefficients]) -> Tensor:
    start = 0
    for length in _segments(len(polynomials)):
        segment = polynomials[start : start + length]
        start += length
        R = X.new_empty(*X.shape[:-1], X.shape[-2])
        baddgram(R, X, beta=0, alpha=1, out=R)
        new, free = torch.empty_like(R), torch.empty_like(R)
        P = Q = _evaluate(segment[0], R, out=torch.empty_like(R))
        for polynomial in segment[1:]:
            # P R P is P X (P X)'; all are polynomials of R, so they commute
            baddbmm_commuting(free, R, P, beta=0, alpha=1, out=free)
            baddbmm_commuting(R, P, free, beta=0, alpha=1, out=R)
            P = _evaluate(polynomial, R, out=new)
            baddbmm_commuting(free, Q, P, beta=0, alpha=1, out=free)
            Q, free = free, Q
        X = matmul(Q, X)
    return X


def _evaluate(polynomial: Coefficients, R: Tensor, out: Tensor) -> Tensor:
    r"""Return \(aI + bR + cR^2\)."""
    a, b, c = polynomial
    baddbmm_commuting(R, R, R, beta=b, alpha=c, out=out)
    out.diagonal(dim1=-2, dim2=-1).add_(a)
    return out


@torch.no_grad()
def polar_factor(
    matrix: Tensor,  # (*b, m, n)
) -> Tensor:  # (*b, m, n)
    r"""Compute the polar factor \(U V^\top\) of each matrix \(U \Sigma V^\top\) exactly.

    Singular values up to \(\max(m, n) \, \epsilon \, \sigma_1\), with the machine precision
    \(\epsilon\), count as zero.

    Args:
        matrix: The stack. Half precision is computed in float32.

    Returns:
        The polar factors, in the dtype of the input.

    Raises:
        StructPrecondError: If the input is no stack of matrices.

    Example:
        >>> polar_factor(torch.tensor([[0.0, -2.0], [0.0, 0.0]]))
        tensor([[ 0., -1.],
                [ 0.,  0.]])
    """
    if matrix.ndim < 2 or not matrix.is_floating_point():
        raise StructPrecondError(
            f"polar_factor takes stacks (*b, m, n) of real matrices, got a tensor of shape "
            f"{tuple(matrix.shape)} and {matrix.dtype}."
        )
    if not matrix.numel():
        return matrix.clone()
    X = _scaled(at_least_float32(matrix))
    svd = torch.linalg.svd(X, full_matrices=False)
    zero = svd.S[..., :1] * max(matrix.shape[-2:]) * torch.finfo(X.dtype).eps
    kept = torch.gt(svd.S, zero).to(X.dtype)
    with full_precision():
        return torch.matmul(svd.U * kept.unsqueeze(-2), svd.Vh).to(matrix.dtype)
