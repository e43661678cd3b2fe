"""Eigenbases against recorded values and numpy's float64 decompositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from structprecond import DecompositionError, DenseMatrix
from structprecond.linalg import (
    eigh,
    get_eigenbasis_eigh,
    get_eigenbasis_qr,
    off_diagonal_ratio,
    orthogonal_iteration,
    precision,
    rayleigh_quotients,
    sort_eigenbasis_by_approx_eigvals,
)
from tests import golden


def _psd(*shape: int, rank: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    X = torch.randn(*shape[:-1], rank or shape[-1] + 2, dtype=dtype)
    return X @ X.mT


def _orthogonality_error(Q: Tensor) -> float:
    return float((Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max())


def _up_to_sign(actual: Tensor, expected: Tensor) -> float:
    signs = (actual * expected).sum(0).sign()
    return float((actual * signs - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", golden.names("eigenbasis_"))
def test_reproduces_the_recorded_eigenbases(name: str) -> None:
    recorded = golden.load(name)
    z = {key: torch.from_numpy(value) for key, value in recorded.arrays.items()}
    L, R = get_eigenbasis_eigh([z["L"], z["R"]])
    assert _up_to_sign(L, z["Q_eigh_L"]) < 1e-4
    assert _up_to_sign(R, z["Q_eigh_R"]) < 1e-4
    factors, bases = [z["L2"], z["R2"]], [z["Q_in_L"], z["Q_in_R"]]
    sorted_bases, v = sort_eigenbasis_by_approx_eigvals(factors, bases, z["v"])
    assert torch.equal(sorted_bases[0], z["Q_sorted_L"])
    assert torch.equal(sorted_bases[1], z["Q_sorted_R"])
    assert torch.equal(v, z["v_sorted"])
    L, R = get_eigenbasis_qr(factors, sorted_bases, recorded.meta["power_iter_steps"])
    assert _up_to_sign(L, z["Q_qr_L"]) < 1e-4
    assert _up_to_sign(R, z["Q_qr_R"]) < 1e-4


def test_axes_without_a_factor_pass_through() -> None:
    none, v = torch.empty(0), torch.arange(3.0)
    assert get_eigenbasis_eigh([none])[0].numel() == 0
    assert get_eigenbasis_qr([none], [none])[0].numel() == 0
    assert torch.equal(sort_eigenbasis_by_approx_eigvals([none], [none], v)[1], v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_eigh_equals_numpy_and_descends(dtype: torch.dtype) -> None:
    A = _psd(3, 6, 6).to(dtype)
    values, Q = eigh(A)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = np.linalg.eigvalsh(A.double().numpy())[..., ::-1]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert np.abs(values.double().numpy() - expected).max() < tolerance * expected.max()
    rebuilt = (Q * values.unsqueeze(-2)) @ Q.mT
    assert (rebuilt - A).norm() < 10 * tolerance * A.norm()


def test_eigh_tries_again_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    A, real, dtypes = _psd(2, 4, 4, dtype=torch.float32), torch.linalg.eigh, []

    def fails_in_float32(matrix: Tensor) -> tuple[Tensor, Tensor]:
        dtypes.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    values, Q = eigh(A)
    # the stack first, then each row, so that a failing row does not change the others
    assert dtypes == [torch.float32] + 2 * [torch.float32, torch.float64]
    assert values.dtype == torch.float32
    assert ((Q * values.unsqueeze(-2)) @ Q.mT - A).norm() < 1e-5 * A.norm()


def test_a_single_matrix_is_tried_again_too(monkeypatch: pytest.MonkeyPatch) -> None:
    A, real = _psd(4, 4, dtype=torch.float32), torch.linalg.eigh

    def fails_in_float32(matrix: Tensor) -> tuple[Tensor, Tensor]:
        if matrix.dtype == torch.float32:
            raise LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    values, Q = eigh(A)
    assert values.shape == (4,)
    assert ((Q * values) @ Q.mT - A).norm() < 1e-5 * A.norm()
    with pytest.raises(DecompositionError) as error:
        eigh(A * torch.nan)
    assert error.value.rows == [0]


def test_eigh_names_the_rows_that_fail() -> None:
    A = _psd(3, 4, 4)
    A[1, 0, 0] = torch.nan
    with pytest.raises(DecompositionError, match=r"matrices \[1\] of a stack") as error:
        eigh(A)
    assert error.value.rows == [1]


def test_orthogonal_iteration_converges_to_the_eigenbasis() -> None:
    A = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64))
    U = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    A = U @ A @ U.mT
    start = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    ratios = [off_diagonal_ratio(A, orthogonal_iteration(A, start, n)) for n in (1, 10, 60)]
    assert ratios[0] > ratios[1] > ratios[2]
    assert ratios[2] < 1e-12
    assert _up_to_sign(orthogonal_iteration(A, start, 60), U) < 1e-12


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e18])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_orthogonal_iteration_is_orthogonal_for_any_rank_and_scale(rank: int, scale: float) -> None:
    A = _psd(2, 8, 8, rank=rank, dtype=torch.float32) if rank else torch.zeros(2, 8, 8)
    Q = torch.linalg.qr(torch.randn(2, 8, 8))[0]
    for _ in range(20):
        Q = orthogonal_iteration(A * scale, Q)
        assert _orthogonality_error(Q) < 1e-5


def test_rayleigh_quotients_are_the_diagonal_of_the_rotated_matrix() -> None:
    A, Q = _psd(3, 5, 5), torch.randn(3, 5, 5, dtype=torch.float64)
    expected = (Q.mT @ A @ Q).diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(rayleigh_quotients(A, Q), expected, rtol=1e-12)


def test_off_diagonal_ratio_on_a_matrix_worked_by_hand() -> None:
    A = torch.tensor([[[3.0, 4.0], [4.0, 0.0]], [[1.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
    expected = torch.tensor([(32 / 41) ** 0.5, 0.0, 0.0])
    assert torch.allclose(off_diagonal_ratio(A, torch.eye(2).expand(3, 2, 2)), expected)


@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1e24, 1e36])
def test_off_diagonal_ratio_does_not_depend_on_scale(scale: float) -> None:
    A, Q = _psd(3, 5, 5, dtype=torch.float32), torch.linalg.qr(torch.randn(3, 5, 5))[0]
    rotated = Q.mT.double() @ A.double() @ Q.double()
    rest = rotated - rotated.diagonal(dim1=1, dim2=2).diag_embed()
    expected = torch.linalg.matrix_norm(rest) / torch.linalg.matrix_norm(A.double())
    assert torch.allclose(off_diagonal_ratio(scale * A, Q).double(), expected, rtol=1e-5)
    blocks = DenseMatrix(scale * A).off_diagonal_ratio(DenseMatrix(Q))
    assert torch.allclose(blocks.double(), expected, rtol=1e-5)


def test_global_precision_settings_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_onednn_keeps_float32", lambda: False)
    A, Q = _psd(64, 64, dtype=torch.float32), torch.linalg.qr(torch.randn(64, 64))[0]
    expected = orthogonal_iteration(A, Q), rayleigh_quotients(A, Q), off_diagonal_ratio(A, Q)
    seen = []
    real = torch.geqrf

    def spy(matrix: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]
        return real(matrix)

    torch.set_float32_matmul_precision("medium")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "geqrf", spy)
            actual = orthogonal_iteration(A, Q), rayleigh_quotients(A, Q), off_diagonal_ratio(A, Q)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["ieee"]
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
