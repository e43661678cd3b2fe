"""Symmetric products against plain ones, at sizes computed in full and by halves."""

from __future__ import annotations

import pytest
import torch

from structprecond.linalg.symmetric import baddbmm_commuting, baddgram

SIZES = [1, 5, 767, 768, 1001]
FACTORS = [(0.0, 1.0), (0.9, 0.1), (-4.0, 0.0), (0.0, 0.0), (1.0, -2.0)]


@pytest.mark.parametrize(("beta", "alpha"), FACTORS)
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("n", SIZES)
def test_gram_matrices(n: int, layout: str, beta: float, alpha: float) -> None:
    X = torch.randn(2, n, 7)
    if layout == "columns":
        X = X.mT.contiguous().mT
    summand = torch.randn(2, n, n)
    summand += summand.mT.clone()
    expected = beta * summand.double() + alpha * (X.double() @ X.double().mT)
    out = torch.full_like(summand, torch.nan)
    assert baddgram(summand, X, beta=beta, alpha=alpha, out=out) is out
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    baddgram(summand, X, beta=beta, alpha=alpha, out=summand)
    torch.testing.assert_close(summand.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("beta", "alpha"), FACTORS)
@pytest.mark.parametrize("n", SIZES)
def test_products_of_polynomials_of_one_matrix(n: int, beta: float, alpha: float) -> None:
    root = torch.randn(2, n, n, dtype=torch.float64) / n**0.5
    exact = root + root.mT
    A = exact.float()
    B = (exact @ exact + exact).float()
    expected = beta * exact + alpha * (exact @ exact @ exact + exact @ exact)
    out = torch.full_like(A, torch.nan)
    baddbmm_commuting(A, A, B, beta=beta, alpha=alpha, out=out)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


def test_what_is_not_read_may_be_nan() -> None:
    for n in (5, 768):
        X, out = torch.randn(1, n, 3), torch.full((1, n, n), torch.nan)
        baddgram(out, X, beta=0, alpha=1, out=out)
        torch.testing.assert_close(out, X @ X.mT, rtol=1e-5, atol=1e-5)
        out.fill_(torch.nan)
        baddgram(out, X, beta=0, alpha=0, out=out)
        assert torch.equal(out, torch.zeros_like(out))
