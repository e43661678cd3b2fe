"""Inverse roots against numpy's float64 decompositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from structprecond import StructPrecondError
from structprecond.linalg import matrix_inverse_root


def _psd(condition: float, n: int = 9, batch: int = 3) -> Tensor:
    Q = torch.linalg.qr(torch.randn(batch, n, n, dtype=torch.float64))[0]
    values = torch.logspace(0, -np.log10(condition), n, dtype=torch.float64)
    return (Q * values) @ Q.mT


def _oracle(A: Tensor, root: float, damping: float) -> Tensor:
    values, Q = np.linalg.eigh(A.numpy())
    return torch.from_numpy(
        (Q * (values + damping)[..., None, :] ** (-1 / root)) @ Q.swapaxes(-1, -2)
    )


@pytest.mark.parametrize("root", [1, 2, 3, 4, 8, 2.5])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_eigh_equals_numpy(root: float, damping: float) -> None:
    A = _psd(1e4)
    expected = _oracle(A, root, damping)
    actual = matrix_inverse_root(A, root, damping)
    assert (actual - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize(
    ("method", "root"),
    [("coupled_newton", r) for r in (1, 2, 3, 4, 8)] + [("newton_db", 2), ("newton_db", 4)],
)
def test_iterations_agree_with_numpy_on_well_conditioned_matrices(method, root: int) -> None:
    A = 7.0 * _psd(100)
    expected = _oracle(A, root, 1e-3)
    actual = matrix_inverse_root(A, root, 1e-3, method=method)
    assert (actual - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("method", ["eigh", "coupled_newton", "newton_db"])
def test_stacks_of_any_order_are_their_matrices(method) -> None:
    A, damping = _psd(50, batch=6).view(2, 3, 9, 9), torch.rand(2, 3, dtype=torch.float64)
    actual = matrix_inverse_root(A, 4, damping, method=method)
    for i in range(2):
        for j in range(3):
            expected = _oracle(A[i, j], 4, damping[i, j].item())
            assert (actual[i, j] - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("method", ["coupled_newton", "newton_db"])
def test_iterations_do_not_depend_on_the_rest_of_the_stack(method) -> None:
    # they converge after different numbers of steps, the last one never
    A = torch.cat([_psd(condition, batch=1) for condition in (1.5, 3, 100, 1e4, 1e16)])
    together = matrix_inverse_root(A, 2, method=method)
    for matrix, expected in zip(A, together, strict=True):
        alone = matrix_inverse_root(matrix, 2, method=method)
        assert (alone - expected).norm() < 1e-11 * expected.norm()


def test_damping_can_differ_from_matrix_to_matrix() -> None:
    A, damping = _psd(10), torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    actual = matrix_inverse_root(A, 2, damping)
    for i in range(3):
        assert torch.allclose(actual[i], _oracle(A[i], 2, damping[i].item()), rtol=1e-9)


def test_eigenvalues_that_rounding_made_negative_give_finite_roots() -> None:
    A = torch.diag(torch.tensor([1.0, 1e-3, -1e-6]))
    actual = matrix_inverse_root(A, 4, 1e-8)
    # shifted up by 1e-6, so the smallest eigenvalue is the damping
    assert actual.isfinite().all()
    assert actual[2, 2].item() == pytest.approx(1e-8**-0.25, rel=1e-3)


def test_zero_matrix_is_the_root_of_the_damping() -> None:
    assert torch.allclose(matrix_inverse_root(torch.zeros(3, 3), 4, 1e-4), 10 * torch.eye(3))


def test_half_precision_is_computed_in_float32() -> None:
    A = _psd(10).to(torch.bfloat16)
    actual = matrix_inverse_root(A, 2)
    assert actual.dtype == torch.float32
    assert (actual - _oracle(A.double(), 2, 0.0)).norm() < 1e-4 * actual.norm()


@pytest.mark.parametrize(("method", "root"), [("newton_db", 3), ("coupled_newton", 2.5), ("lu", 2)])
def test_unknown_combinations_raise(method, root: float) -> None:
    with pytest.raises(StructPrecondError, match=f"Method '{method}'.*order {root}"):
        matrix_inverse_root(torch.eye(2), root, method=method)
