"""Orthogonal factors against torch's QR, especially by panels of reflections."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from structprecond import DecompositionError
from structprecond.linalg import qr
from structprecond.linalg.cholesky_qr import cholesky_qr2
from structprecond.linalg.qr import orthogonal_factor, transposed


def _rank_deficient(n: int) -> Tensor:
    return torch.randn(2, n, n // 3) @ torch.randn(2, n // 3, n)


def _graded(n: int) -> Tensor:
    """Return columns of very different lengths, like a factor times its basis."""
    return torch.randn(2, n, n) * torch.logspace(0, -12, n)


MATRICES: dict[str, Callable[[int], Tensor]] = {
    "random": lambda n: torch.randn(2, n, n),
    "transposed view": lambda n: torch.randn(2, n, n).mT,
    "one matrix": lambda n: torch.randn(n, n),
    "nested stacks": lambda n: torch.randn(2, 1, n, n),
    "graded": _graded,
    "triangular": lambda n: torch.randn(2, n, n).triu(),
    "with columns of zeros": lambda n: torch.randn(2, n, n) * (torch.arange(n) % 3 > 0),
    "identity": lambda n: torch.eye(n).expand(2, n, n),
    "tiny": lambda n: 1e-35 * torch.randn(2, n, n),
    "huge": lambda n: 1e35 * torch.randn(2, n, n),
}
# below and above the smallest size for panels; not a multiple of their width
SIZES = [60, 515, 640]


@pytest.fixture(params=["reflections", "Cholesky"], autouse=True)
def algorithm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the accelerators' algorithm too."""
    if request.param == "Cholesky":
        monkeypatch.setattr(qr, "_reflections_are_slow", lambda device: True)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", MATRICES)
def test_is_the_orthogonal_factor(kind: str, n: int, dtype: torch.dtype) -> None:
    matrix = MATRICES[kind](n).to(dtype)
    before = matrix.clone()
    Q = orthogonal_factor(matrix)
    assert torch.equal(matrix, before)
    assert Q.shape == matrix.shape
    assert Q.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert (Q.mT @ Q - torch.eye(n, dtype=dtype)).abs().max() < 50 * eps
    R = Q.mT.double() @ matrix.double()
    largest = matrix.abs().max().double()
    assert R.tril(-1).abs().max() < 100 * n**0.5 * eps * largest
    # every column of a graded matrix is accurate, not only the long ones
    lengths = torch.linalg.vector_norm(matrix.double(), dim=-2, keepdim=True)
    assert (R.tril(-1).abs() <= 100 * n**0.5 * eps * lengths).all()


@pytest.mark.parametrize("n", SIZES)
def test_signs_are_those_of_reflections_or_those_of_a_positive_diagonal(
    n: int, algorithm: str
) -> None:
    matrix = torch.randn(2, n, n, dtype=torch.float64)
    Q, R = torch.linalg.qr(matrix)
    if algorithm == "Cholesky":
        Q = Q * R.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
    assert torch.allclose(orthogonal_factor(matrix), Q, atol=1e-9)


def test_cholesky_says_what_can_be_relied_on() -> None:
    n = 40
    U, V = torch.linalg.qr(torch.randn(2, n, n))[0]
    conditions = torch.logspace(0, 7, 15)
    matrix = torch.stack([U @ torch.logspace(0, -p, n).diag() @ V for p in conditions.log10()])
    bad = torch.stack([torch.zeros(n, n), torch.full((n, n), torch.nan), torch.ones(n, n)])
    Q, reliable = cholesky_qr2(torch.cat([matrix, bad]))
    errors = (Q.mT @ Q - torch.eye(n)).abs().amax((1, 2))
    assert (errors[reliable] < 1e-5).all()
    assert reliable[:15][conditions < 900].all()
    assert not reliable[-3:].any()
    # very different lengths of columns do not matter
    graded = torch.linalg.qr(torch.randn(n, n))[0] * torch.logspace(0, -18, n)
    assert cholesky_qr2(graded.unsqueeze(0))[1].all()


def test_reflections_take_over_where_cholesky_cannot_be_relied_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(qr, "_reflections_are_slow", lambda device: True)
    seen = []
    geqrf = torch.geqrf
    monkeypatch.setattr(torch, "geqrf", lambda A: seen.append(A.clone()) or geqrf(A))  # type: ignore[func-returns-value]
    matrix = torch.randn(4, 9, 9)
    orthogonal_factor(matrix)
    assert not seen
    matrix[2, :, 3] = matrix[2, :, 5]
    Q = orthogonal_factor(matrix)
    assert len(seen) == 1
    assert seen[0].shape == (1, 9, 9)
    assert (Q.mT @ Q - torch.eye(9)).abs().max() < 1e-5


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", ["rank-deficient", "zero"])
def test_is_orthogonal_whatever_the_rank(kind: str, n: int) -> None:
    matrix = _rank_deficient(n) if kind == "rank-deficient" else torch.zeros(2, n, n)
    Q = orthogonal_factor(matrix)
    assert (Q.mT @ Q - torch.eye(n)).abs().max() < 1e-5
    R = Q.mT.double() @ matrix.double()
    assert R.tril(-1).abs().max() < 1e-4 * matrix.abs().max() + 1e-30


@pytest.mark.parametrize("n", SIZES)
def test_names_the_matrices_that_are_not_finite(n: int) -> None:
    matrix = torch.randn(3, n, n)
    matrix[1, 5, 7] = torch.nan
    with pytest.raises(DecompositionError) as error:
        orthogonal_factor(matrix)
    assert error.value.rows == [1]


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (2, 3, 600), (2, 3, 4, 600), (0, 3, 600)])
def test_transposes_are_contiguous_copies(shape: tuple[int, ...]) -> None:
    stack = torch.randn(shape)
    copy = transposed(stack)
    assert torch.equal(copy, stack.mT)
    assert copy.is_contiguous()
    assert not stack.numel() or copy.data_ptr() != stack.data_ptr()


@pytest.mark.parametrize("n", SIZES)
def test_stays_on_the_device_of_its_input(n: int) -> None:
    matrix = torch.randn(2, n, n)
    with torch.device("meta"):
        assert orthogonal_factor(matrix).device == transposed(matrix).device == matrix.device
