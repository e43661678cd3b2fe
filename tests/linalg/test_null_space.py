"""Null spaces of eigenbases do not depend on rounding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from structprecond import DecompositionError
from structprecond.linalg import (
    improve_eigenbasis,
    left_eigenbasis,
    null_space,
    orthogonal_iteration,
    refresh_eigenbasis,
)
from structprecond.linalg.null_space import complete_basis
from structprecond.linalg.qr import factor_and_diagonal

DTYPES = [(torch.float64, 1e-15), (torch.float32, 1e-7)]


def _low_rank(*shape: int, rank: int, dtype: torch.dtype = torch.float64) -> Tensor:
    *batch, m, n = shape
    left = torch.randn(*batch, m, rank, dtype=dtype)
    return left @ torch.randn(*batch, rank, n, dtype=dtype)


def _with_dead_rows(matrix: Tensor) -> Tensor:
    matrix[..., [0, 3, -1], :] = 0
    return matrix


def _two_blocks(dtype: torch.dtype) -> Tensor:
    matrix = torch.zeros(30, 6, dtype=dtype)
    matrix[:15, :3] = torch.randn(15, 3, dtype=dtype)
    matrix[15:, 3:] = 2 * torch.randn(15, 3, dtype=dtype)
    return matrix


def _equal_rows(dtype: torch.dtype) -> Tensor:
    matrix = torch.randn(30, 5, dtype=dtype)
    matrix[1], matrix[29] = matrix[0], matrix[28]
    return matrix


GRADIENTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "tall": lambda dtype: torch.randn(30, 5, dtype=dtype),
    "wide": lambda dtype: torch.randn(12, 20, dtype=dtype),
    "wide of rank 3": lambda dtype: _low_rank(12, 20, rank=3, dtype=dtype),
    "tall of rank 3": lambda dtype: _low_rank(20, 12, rank=3, dtype=dtype),
    "dead rows": lambda dtype: _with_dead_rows(torch.randn(30, 5, dtype=dtype)),
    "dead rows, wide": lambda dtype: _with_dead_rows(torch.randn(12, 20, dtype=dtype)),
    "only dead rows but one": lambda dtype: torch.eye(12, dtype=dtype)[:, 5:6] * torch.ones(7),
    "blocks": _two_blocks,
    "equal rows": _equal_rows,
    "rows all alike": lambda dtype: torch.ones(30, 1, dtype=dtype) * torch.arange(1, 6),
    "sums of 0": lambda dtype: (lambda X: X - X.mean(0))(torch.randn(30, 5, dtype=dtype)),
    "zero": lambda dtype: torch.zeros(12, 5, dtype=dtype),
    "stack of several ranks": lambda dtype: torch.stack(
        [_low_rank(12, 20, rank=r, dtype=dtype) for r in (1, 5, 20)] + [torch.zeros(12, 20)]
    ),
    "nested stacks": lambda dtype: torch.randn(2, 3, 8, 3, dtype=dtype),
}


def _orthogonality_error(Q: Tensor) -> float:
    return float((Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max())


def _distance(Q: Tensor, P: Tensor) -> float:
    """Compare columns up to their signs."""
    signs = torch.where((Q * P).sum(-2, keepdim=True) < 0, -1.0, 1.0)
    return float((Q * signs - P).abs().max())


@pytest.mark.parametrize(("dtype", "eps"), DTYPES)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_rounding_does_not_decide_on_the_first_basis(
    kind: str, dtype: torch.dtype, eps: float
) -> None:
    torch.manual_seed(3)
    X = GRADIENTS[kind](dtype).to(dtype)
    Q = left_eigenbasis(X)
    assert Q.shape == (*X.shape[:-1], X.shape[-2])
    assert _orthogonality_error(Q) < 100 * eps
    for _ in range(10):
        disturbed = left_eigenbasis(X * (1 + eps * torch.randn_like(X)))
        assert _distance(disturbed, Q) < 200 * eps


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_the_first_basis_has_numpys_singular_vectors_and_values(kind: str, scale: float) -> None:
    torch.manual_seed(4)
    X = GRADIENTS[kind](torch.float64).double()
    Q = left_eigenbasis((X * scale).float() if scale != 1 else X).double()
    U, singular, _ = np.linalg.svd(X.numpy())
    values = torch.zeros(Q.shape[:-1], dtype=torch.float64)
    values[..., : singular.shape[-1]] = torch.from_numpy(singular**2)
    largest = values.max().clamp(min=1.0)
    rotated = Q.mT @ X @ X.mT @ Q
    tolerance = 1e-13 if scale == 1 else 1e-5
    assert (rotated - values.diag_embed()).abs().max() < tolerance * largest
    # null spaces agree as subspaces
    null = torch.from_numpy(U) * (values <= 1e-12 * largest).unsqueeze(-2)
    ours = Q * (values <= 1e-12 * largest).unsqueeze(-2)
    assert (null @ null.mT - ours @ ours.mT).abs().max() < max(tolerance, 1e-12)


def test_the_null_space_is_that_of_a_complete_qr_decomposition() -> None:
    U = torch.linalg.qr(torch.randn(3, 9, 4, dtype=torch.float64))[0]
    Q = complete_basis(U, torch.zeros(3, 4, dtype=torch.bool))
    complete = torch.linalg.qr(U, mode="complete")[0]
    # the rule's signs, for a positive product with cos(0), cos(1), ..., change nothing here but
    # the columns of U itself
    assert _distance(Q, complete) < 1e-13
    flipped = U * torch.tensor([1.0, -1.0, -1.0, 1.0])
    assert torch.equal(complete_basis(flipped, torch.zeros(3, 4, dtype=torch.bool)), Q)


def test_full_rows_of_a_stack_are_left_alone() -> None:
    U = torch.linalg.qr(torch.randn(2, 6, 6, dtype=torch.float64))[0]
    null = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    Q = complete_basis(U, null)
    assert torch.equal(Q[0], U[0])
    assert _distance(Q[1][:, :4], U[1][:, :4]) < 1e-13
    assert _distance(Q[1], U[1]) > 0.1
    assert _orthogonality_error(Q) < 1e-14


def _spectral(values: Tensor, U: Tensor) -> Tensor:
    return U * values.unsqueeze(-2) @ U.mT


def _by_the_rule(S: Tensor, Q: Tensor, rank: int, key: Tensor) -> tuple[Tensor, Tensor]:
    """Refresh one basis by the rule: leading columns sorted by a key, then null ones."""
    quotients = (Q.mT @ S @ Q).diagonal()
    null = quotients <= 4 * len(S) ** 0.5 * torch.finfo(S.dtype).eps * quotients.max()
    leading = (~null).nonzero().squeeze(1)
    leading = leading[key[leading].argsort(descending=True, stable=True)]
    assert len(leading) == rank
    order = torch.cat([leading, null.nonzero().squeeze(1)])
    columns = torch.cat([S @ Q[:, leading], Q[:, null]], dim=1)
    better, R = torch.linalg.qr(columns)
    return better * R.diagonal().sign(), order


def test_a_refresh_sorts_leading_columns_and_keeps_null_ones() -> None:
    torch.manual_seed(0)
    n, rank = 9, 5
    U = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    values = torch.tensor([1.0, 3.0, 0.0, 2.0, 0.0, 5.0, 4.0, 0.0, 0.0], dtype=torch.float64)
    S = _spectral(values, U)
    # close to the eigenvectors in the range, exact in the null space, in any order
    mixed = torch.linalg.matrix_exp(0.1 * torch.randn(rank, rank, dtype=torch.float64).tril(-1))
    Q = U.clone()
    Q[:, values > 0] = U[:, values > 0] @ torch.linalg.qr(mixed)[0]
    quotients = (Q.mT @ S @ Q).diagonal()
    expected, order = _by_the_rule(S, Q, rank, quotients)
    better, found = refresh_eigenbasis(S, Q)
    assert torch.equal(found, order)
    assert _distance(better, expected) < 1e-12
    # null columns keep their direction too
    assert torch.allclose(better[:, rank:], Q[:, values == 0], atol=1e-12)
    expected, order = _by_the_rule(S, Q, rank, torch.zeros(n))
    assert _distance(improve_eigenbasis(S, Q), expected[:, order.argsort()]) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_bases_of_full_rank_are_refreshed_as_published(seed: int) -> None:
    torch.manual_seed(seed)
    X = torch.randn(3, 7, 20, dtype=torch.float64)
    S, Q = X @ X.mT, torch.linalg.qr(torch.randn(3, 7, 7, dtype=torch.float64))[0]
    order = (Q.mT @ S @ Q).diagonal(dim1=1, dim2=2).argsort(descending=True)
    better, found = refresh_eigenbasis(S, Q)
    assert torch.equal(found, order)
    in_order = torch.stack([q[:, o] for q, o in zip(Q, order, strict=True)])
    assert _distance(better, torch.linalg.qr(S @ in_order)[0]) < 1e-12
    assert torch.equal(improve_eigenbasis(S, Q), orthogonal_iteration(S, Q))


@pytest.mark.parametrize(("dtype", "eps"), DTYPES)
@pytest.mark.parametrize("ranks", [(9, 5), (10, 10), (1, 12), (5, 0)])
def test_rounding_does_not_decide_where_the_rank_is_below_that_of_the_quotients(
    ranks: tuple[int, int], dtype: torch.dtype, eps: float
) -> None:
    # columns of any direction have quotients far above rounding, whatever the rank of S
    torch.manual_seed(5)
    U = torch.linalg.qr(torch.randn(2, 12, 12, dtype=dtype))[0]
    values = torch.linspace(3, 1, 12, dtype=dtype) * (
        torch.arange(12) < torch.tensor(ranks)[:, None]
    )
    S = _spectral(values, U)
    Q = torch.linalg.qr(torch.randn(2, 12, 12, dtype=dtype))[0]
    sorted_basis, order = refresh_eigenbasis(S, Q)
    unsorted = improve_eigenbasis(S, Q)
    for basis in (sorted_basis, unsorted):
        assert _orthogonality_error(basis) < 100 * eps
    for row, rank in enumerate(ranks):
        # the leading columns span the range
        leading, expected = sorted_basis[row][:, :rank], U[row][:, :rank]
        assert (leading @ leading.mT - expected @ expected.mT).abs().max() < 1e4 * eps
    for _ in range(5):
        noise = torch.randn_like(S)
        disturbed = S * (1 + eps * (noise + noise.mT))
        basis, same = refresh_eigenbasis(disturbed, Q)
        assert torch.equal(same, order)
        assert _distance(basis, sorted_basis) < 1e4 * eps
        assert _distance(improve_eigenbasis(disturbed, Q), unsorted) < 1e4 * eps


def test_null_spaces_of_a_stack_and_of_its_matrices_are_the_same() -> None:
    S = torch.stack([_low_rank(8, 8, rank=r) for r in (8, 3, 8, 1, 5)])
    S = S @ S.mT
    S[2] = 0
    Q = torch.linalg.qr(torch.randn(5, 8, 8, dtype=torch.float64))[0]
    better, order = refresh_eigenbasis(S, Q)
    nested, nested_order = refresh_eigenbasis(S.unsqueeze(1), Q.unsqueeze(1))
    assert torch.equal(nested.squeeze(1), better)
    assert torch.equal(nested_order.squeeze(1), order)
    for row in range(5):
        one, own = refresh_eigenbasis(S[row], Q[row])
        assert torch.equal(own, order[row])
        assert torch.allclose(one, better[row], atol=1e-9)
    assert torch.allclose(better[2], Q[2], atol=1e-14)


def test_matrices_that_are_not_finite_are_named() -> None:
    S = torch.stack([_low_rank(6, 6, rank=2)] * 3)
    S = S @ S.mT
    S[1, 2, 2] = torch.nan
    Q = torch.eye(6, dtype=torch.float64).expand(3, 6, 6)
    for function in (refresh_eigenbasis, improve_eigenbasis):
        with pytest.raises(DecompositionError) as error:
            function(S, Q)
        assert error.value.rows == [1]
    for shape in ((3, 6, 2), (3, 6, 8)):
        X = torch.randn(shape)
        X[2, 0, 0] = torch.inf
        with pytest.raises(DecompositionError) as error:
            left_eigenbasis(X)
        assert error.value.rows == [2]


def test_rows_that_fail_when_they_are_decomposed_again_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    S = torch.stack([_low_rank(6, 6, rank=r) for r in (6, 6, 2, 3)])
    S = S @ S.mT
    Q = torch.linalg.qr(torch.randn(4, 6, 6, dtype=torch.float64))[0]
    real, calls = factor_and_diagonal, []

    def fails_at_the_second_call(matrix: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(matrix))
        if len(calls) == 2:
            raise DecompositionError("failed", [1])
        return real(matrix)

    monkeypatch.setattr(null_space, "factor_and_diagonal", fails_at_the_second_call)
    with pytest.raises(DecompositionError) as error:
        refresh_eigenbasis(S, Q)
    assert calls == [4, 2]
    assert error.value.rows == [3]


def test_a_long_axis_beside_a_short_one_costs_a_small_problem() -> None:
    # an eigendecomposition of this size takes 100 times as long
    X = torch.randn(1, 2000, 4)
    sizes = []
    real = torch.linalg.svd

    def spy(matrix: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
        sizes.append((matrix.shape, full_matrices))
        return real(matrix, full_matrices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "svd", spy)
        patch.delattr(torch.linalg, "eigh")
        patch.delattr(torch.linalg, "householder_product")
        Q = left_eigenbasis(X)
    assert sizes == [((1, 2000, 4), False)]
    assert _orthogonality_error(Q) < 1e-5
