"""Triangular Toeplitz matrices, multiplied as convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from structprecond.linalg.product import matmul
from structprecond.structures.base import StructuredMatrix, _per_matrix, matmul_like

# Measured on 2 cores, float32: up to this size, and with at least so many columns, products in
# chunks of 128 rows beat the FFT, and chunks of 64 or 256 rows.
_LARGEST_CHUNKED = 1024
_FEWEST_COLUMNS = 16
_CHUNK = 128
# Up to this number of pairs of rows per column, the inner products of all pairs beat the FFT.
_MOST_PAIRS = 4096


@dataclass(eq=False)
class TriangularToeplitzMatrix(StructuredMatrix):
    r"""Triangular Toeplitz matrices, stored as their n coefficients.

    For \(d > 0\), the d-th diagonal of \(\Pi(S)\) holds the sum of the d-th lower and upper
    diagonals of S over \(n - d\). The main diagonal holds its mean.

    Args:
        coefficients: `(*b, n)`, entry d belongs to the d-th lower (or upper) diagonal; not copied.

    Source: Lin et al. 2024 (arXiv 2312.05705), figure 5.
    """

    coefficients: Tensor
    lower: ClassVar[bool]
    """Whether the matrices are lower triangular."""

    @classmethod
    def from_dense(cls, sym_mat: Tensor) -> Self:
        """Average the diagonals of `(*b, n, n)`."""
        both = sym_mat + sym_mat.mT
        return cls._from_diagonal_sums(_sum_diagonals(both.contiguous()))

    @classmethod
    def _from_diagonal_sums(cls, sums: Tensor) -> Self:
        """Divide sums over both d-th diagonals by their lengths; the main one counts twice."""
        n = sums.shape[-1]
        counts = torch.arange(n, 0, -1, dtype=sums.dtype, device=sums.device)
        counts[0] *= 2
        return cls(sums / counts)

    def to_dense(self) -> Tensor:
        """Return the dense matrices."""
        return _to_dense(self.coefficients, self.lower).contiguous()

    @property
    def shape(self) -> torch.Size:
        """The shape `(*b, n, n)`."""
        return torch.Size([*self.coefficients.shape, self.coefficients.shape[-1]])

    @classmethod
    def zeros(
        cls,
        dim: int,
        batch_shape: Sequence[int] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Return a stack of zero matrices."""
        return cls(torch.zeros(*batch_shape, dim, dtype=dtype, device=device))

    def matmat(self, X: Tensor) -> Tensor:
        r"""Return \(A X\)."""
        return _multiply(self.coefficients, X, self.lower)

    def rmatmat(self, X: Tensor) -> Tensor:
        r"""Return \(A^\top X\)."""
        return _multiply(self.coefficients, X, not self.lower)

    def _compose(self, other: Self) -> Self:
        product = _multiply(self.coefficients, other.coefficients.unsqueeze(-1), lower=True)
        return type(self)(product.squeeze(-1))

    @classmethod
    def from_mat_inner(cls, X: Tensor) -> Self:
        r"""Return \(\Pi(X X^\top)\), for few long columns by their autocorrelations."""
        (n, m), dtype = X.shape[-2:], X.dtype
        if n * n <= _MOST_PAIRS * m or m == 0:
            X = X.to(_compute_dtype(dtype))
            return cls._from_diagonal_sums(2 * _sum_diagonals(matmul(X, X.mT))).to(dtype)
        X = X.to(_sum_dtype(X.device))
        length = _fft_length(n)
        spectrum = torch.view_as_real(torch.fft.rfft(X, n=length, dim=-2))
        # the frequencies are innermost in memory, next to real and imaginary parts
        power = spectrum.square_().sum(-1).sum(-1)
        return cls._from_diagonal_sums(2 * torch.fft.irfft(power, n=length)[..., :n]).to(dtype)

    def from_inner(self, X: Tensor | None = None) -> Self:
        r"""Return \(\Pi(A^\top X X^\top A)\), with X the identity if None."""
        if X is not None:
            return self.from_mat_inner(self.rmatmat(X))
        # n - u rows of A hold the product of the coefficients u and u - d
        c = self.coefficients.to(_sum_dtype(self.device))
        weights = torch.arange(c.shape[-1], 0, -1, dtype=c.dtype, device=c.device)
        sums = _multiply(c, (weights * c).unsqueeze(-1), lower=False).squeeze(-1)
        return self._from_diagonal_sums(2 * sums).to(self.dtype)

    def diag_add_(self, value: float | Tensor) -> Self:
        """Add to the diagonal in place."""
        diagonal = self.coefficients[..., 0]
        diagonal.add_(_per_matrix(value, diagonal))
        return self

    def average_trace(self) -> Tensor:
        r"""Return \(\mathrm{tr}(A) / n\)."""
        return self.coefficients[..., 0].clone()

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norms."""
        c = self.coefficients
        counts = torch.arange(c.shape[-1], 0, -1, dtype=c.dtype, device=c.device)
        norms: Tensor = torch.linalg.vector_norm(c * counts.sqrt(), dim=-1)
        return norms

    def infinity_vector_norm(self) -> Tensor:
        """Return the largest absolute entries."""
        return self.coefficients.abs().amax(-1)


class TrilToeplitzMatrix(TriangularToeplitzMatrix):
    r"""Lower triangular Toeplitz matrices.

    Example:
        >>> TrilToeplitzMatrix(torch.tensor([1.0, 2.0, 3.0])).to_dense()
        tensor([[1., 0., 0.],
                [2., 1., 0.],
                [3., 2., 1.]])
    """

    name, lower = "triltoeplitz", True


class TriuToeplitzMatrix(TriangularToeplitzMatrix):
    r"""Upper triangular Toeplitz matrices.

    Example:
        >>> TriuToeplitzMatrix(torch.tensor([1.0, 2.0, 3.0])).to_dense()
        tensor([[1., 2., 3.],
                [0., 1., 2.],
                [0., 0., 1.]])
    """

    name, lower = "triutoeplitz", False


def _sum_diagonals(
    matrix: Tensor,  # (*b, n, n), contiguous
) -> Tensor:  # (*b, n)
    """Return the sums of the upper diagonals, from the main one on; overwrites the matrices."""
    n = matrix.shape[-1]
    flat = matrix.triu_().flatten(-2)
    # rows of length n + 1 start on the main diagonal and end in zeros from below it
    sums: Tensor = flat[..., :-1].unflatten(-1, (n - 1, n + 1))[..., :n].sum(-2)
    sums[..., 0] += flat[..., -1]
    return sums


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return at least float32: half precision has no FFT, and no fast matrix product on CPUs."""
    return dtype if dtype == torch.float64 else torch.float32


def _sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of transforms that sum diagonals.

    A transform rounds all sums as much as the largest one. The last ones are divided by the small
    lengths of their diagonals, so their errors would be up to n times those of the first.
    """
    # Apple's accelerators have no float64
    return torch.float32 if device.type == "mps" else torch.float64


def _fft_length(n: int) -> int:
    """Return a length with small prime factors at which convolutions of length n do not wrap."""
    return min(m << max(0, (-(-(2 * n - 1) // m) - 1).bit_length()) for m in (1, 3, 5, 9, 15))


def _multiply(coefficients: Tensor, X: Tensor, lower: bool) -> Tensor:
    """Multiply lower (or upper) triangular Toeplitz matrices `(*b, n)` by tensors `(*b, n, m)`."""
    n, m = X.shape[-2:]
    dtype = torch.promote_types(coefficients.dtype, X.dtype)
    c, Y = (t.to(_compute_dtype(dtype)) for t in (coefficients, X))
    chunked = n <= _LARGEST_CHUNKED and m >= _FEWEST_COLUMNS
    product = _multiply_chunks(c, Y, lower) if chunked else _multiply_fft(c, Y, lower)
    return product.to(dtype)


def _multiply_fft(c: Tensor, X: Tensor, lower: bool) -> Tensor:
    n = X.shape[-2]
    length = _fft_length(n)
    transfer = torch.fft.rfft(c, n=length).unsqueeze(-1)
    spectrum = torch.fft.rfft(X, n=length, dim=-2)
    spectrum *= transfer if lower else transfer.conj()
    product: Tensor = torch.fft.irfft(spectrum, n=length, dim=-2)[..., :n, :]
    return product


def _multiply_chunks(c: Tensor, X: Tensor, lower: bool) -> Tensor:
    """Multiply in chunks of rows, each a window of one band, and skip the zero triangle."""
    n = X.shape[-2]
    if n <= 2 * _CHUNK:
        # skipping a quarter is not worth it
        return matmul_like(_to_dense(c, lower), X)
    band = _shifted(c.flip(-1) if lower else c, _CHUNK)
    product = torch.empty_like(X)
    for start in range(0, n, _CHUNK):
        stop = min(start + _CHUNK, n)
        first, last = (0, stop) if lower else (start, n)
        offset = n - 1 - start if lower else -start
        window = band[..., : stop - start, first + offset : last + offset]
        product[..., start:stop, :] = matmul_like(window, X[..., first:last, :])
    return product


def _to_dense(c: Tensor, lower: bool) -> Tensor:
    """Return the matrices `(*b, n, n)`, maybe as a view."""
    n = c.shape[-1]
    upper = _shifted(c, n)[..., :n]
    return upper.mT if lower else upper


def _shifted(
    c: Tensor,  # (*b, n)
    rows: int,
) -> Tensor:  # (*b, rows, n + rows - 1)
    """Return `rows` copies of c, row i shifted right by i, padded with zeros."""
    n = c.shape[-1]
    return pad(c, (rows - 1, rows - 1)).unfold(-1, n + rows - 1, 1).flip(-2)
