"""The contract of structured matrices."""

from __future__ import annotations

import copy
import io
import pickle
from typing import ClassVar

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from structprecond.structures import StructuredMatrix

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}

_shapes = st.sampled_from([(), (3,), (2, 3)])
_sizes = st.integers(1, 70)
_dtypes = st.sampled_from(list(_TOLERANCE))
_seeds = st.integers(0, 2**31)
_examples = settings(
    deadline=None, suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow]
)
_arguments = given(batch=_shapes, n=_sizes, dtype=_dtypes, seed=_seeds)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 0.0) -> None:
    """Compare in the Frobenius norm, relative to `expected` or, if larger, to `scale`."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    error = (actual.double() - expected.double()).norm().item()
    assert error <= _TOLERANCE[dtype] * max(expected.double().norm().item(), scale), error


class StructuredMatrixContract:
    """Tests of a `StructuredMatrix`: every operation against dense arithmetic in float64.

    Covers batch shapes `()`, `(3,)` and `(2, 3)`, sizes 1 to 70, float64, float32 and bfloat16, and
    non-symmetric matrices of the space.

    Attributes:
        structure: The class under test.

    Example:
        >>> class TestDiagonal(StructuredMatrixContract):
        ...     structure = DiagonalMatrix
        ...
        ...     def project(self, matrix):
        ...         return matrix * torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    """

    structure: ClassVar[type[StructuredMatrix]]

    def project(self, matrix: Tensor) -> Tensor:
        r"""Return \(\Pi\) of dense symmetric matrices `(*b, n, n)`, densely: the oracle.

        Write it independently of the class under test. The default uses `from_dense` itself.
        """
        return self.structure.from_dense(matrix).to_dense()

    # --- makers ---------------------------------------------------------------------------------

    def _random(self, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def _element(
        self, batch: tuple[int, ...], n: int, dtype: torch.dtype, seed: int
    ) -> StructuredMatrix:
        """Return an element of the space, not symmetric if the space allows."""
        return self.structure.from_dense(self._random((*batch, n, n), dtype, seed))

    # --- the two methods ------------------------------------------------------------------------

    @_examples
    @_arguments
    def test_from_dense_is_the_projection(
        self, batch: tuple[int, ...], n: int, dtype: torch.dtype, seed: int
    ) -> None:
        """from_dense of symmetric matrices is the oracle's projection."""
        matrix = self._random((*batch, n, n), dtype, seed)
        matrix = matrix + matrix.mT
        projected = self.structure.from_dense(matrix)
        assert projected.dtype == dtype
        assert projected.shape == matrix.shape
        assert_close(projected.to_dense(), self.project(matrix.double()), dtype, scale=1.0)

    @_examples
    @_arguments
    def test_from_dense_is_the_identity_on_the_space(
        self, batch: tuple[int, ...], n: int, dtype: torch.dtype, seed: int
    ) -> None:
        """Projecting an element of the space returns it."""
        dense = self._element(batch, n, dtype, seed).to_dense()
        assert_close(self.structure.from_dense(dense).to_dense(), dense, dtype)

    @_examples
    @_arguments
    def test_from_dense_and_to_dense_share_no_memory(
        self, batch: tuple[int, ...], n: int, dtype: torch.dtype, seed: int
    ) -> None:
        """Changing the input or the output does not change the matrix."""
        source = self._random((*batch, n, n), dtype, seed)
        matrix = self.structure.from_dense(source)
        before = matrix.to_dense()
        source.fill_(7.0)
        matrix.to_dense().fill_(7.0)
        assert torch.equal(matrix.to_dense(), before)

    # --- linear space ---------------------------------------------------------------------------

    @_examples
    @_arguments
    def test_linear_operations(
        self, batch: tuple[int, ...], n: int, dtype: torch.dtype, seed: int
    ) -> None:
        """Sums, differences and multiples are those of the dense matrices."""
        A, B = (self._element(batch, n, dtype, seed + i) for i in range(2))
        a, b = A.to_dense().double(), B.to_dense().double()
        row = self._random(batch, dtype, seed + 2)
        per_row = row.double()[..., None, None]
        scale = (a.norm() + b.norm()).item()
        for actual, expected in (
            (A + B, a + b),
            (A - B, a - b),
            (A * 0.5, 0.5 * a),
            (-2.0 * A, -2.0 * a),
            (A * row, per_row * a),
            (A.clone().mul_(3.0), 3 * a),
            (A.clone().mul_(row), per_row * a),
            (A.clone().add_(B, alpha=-0.5), a - 0.5 * b),
            (A.clone().add_(B, alpha=row), a + per_row * b),
        ):
            assert_close(actual.to_dense(), expected, dtype, scale)
        assert_close(A.to_dense(), a, dtype)

    @_examples
    @_arguments
    def test_eye_zeros_and_diagonal(
        self, batch: tuple[int, ...], n: int, dtype: torch.dtype, seed: int
    ) -> None:
        """Identity, zero and multiples of the identity are elements of the space."""
        eye = torch.eye(n).double().expand(*batch, n, n)
        assert torch.equal(self.structure.eye(n, batch, dtype=dtype).to_dense().double(), eye)
        assert not self.structure.zeros(n, batch, dtype=dtype).to_dense().any()
        A = self._element(batch, n, dtype, seed)
        a, row = A.to_dense().double(), self._random(batch, dtype, seed + 1)
        scale = a.norm().item()
        assert_close(A.clone().diag_add_(0.5).to_dense(), a + 0.5 * eye, dtype, scale)
        per_row = a + row.double()[..., None, None] * eye
        assert_close(A.clone().diag_add_(row).to_dense(), per_row, dtype, scale)

    # --- products -------------------------------------------------------------------------------

    @_examples
    @_arguments
    def test_products_with_tensors(
        self, batch: tuple[int, ...], n: int, dtype: torch.dtype, seed: int
    ) -> None:
        """Products with tensors from the left and right, transposed or not, also of views."""
        A = self._element(batch, n, dtype, seed)
        a = A.to_dense().double()
        for columns in (1, 5, 33):
            X = self._random((*batch, n, columns), dtype, seed + columns)
            Y = self._random((*batch, columns, n), dtype, seed + columns + 1)
            x, y = X.double(), Y.double()
            assert_close(A @ X, a @ x, dtype)
            assert_close(A @ Y.mT, a @ y.mT, dtype)
            assert_close(A.rmatmat(X), a.mT @ x, dtype)
            assert_close(A.rmatmat(Y.mT), a.mT @ y.mT, dtype)
            assert_close(
                A.outer_matmat(X), a @ (a.mT @ x), dtype, (a.norm() ** 2 * x.norm()).item()
            )
            assert (A @ X).dtype == dtype

    @_examples
    @_arguments
    def test_products_within_the_structure(
        self, batch: tuple[int, ...], n: int, dtype: torch.dtype, seed: int
    ) -> None:
        """The space is closed under products of non-symmetric elements."""
        A, B = (self._element(batch, n, dtype, seed + i) for i in range(2))
        product = A @ B
        assert type(product) is self.structure
        assert_close(product.to_dense(), A.to_dense().double() @ B.to_dense().double(), dtype)

    @_examples
    @_arguments
    def test_projected_inner_products(
        self, batch: tuple[int, ...], n: int, dtype: torch.dtype, seed: int
    ) -> None:
        """from_mat_inner and from_inner project dense inner products."""
        A = self._element(batch, n, dtype, seed)
        a = A.to_dense().double()
        gram = a.mT @ a
        assert_close(A.from_inner().to_dense(), self.project(gram), dtype, gram.norm().item())
        for columns in (1, 7):
            X = self._random((*batch, n, columns), dtype, seed + columns)
            Y = self._random((*batch, columns, n), dtype, seed + columns + 1)
            for factor in (X, Y.mT):
                x = factor.double()
                outer = x @ x.mT
                actual = self.structure.from_mat_inner(factor)
                assert_close(actual.to_dense(), self.project(outer), dtype, outer.norm().item())
                inner = a.mT @ outer @ a
                actual = A.clone().add_inner_(factor, 0.5, -2.0)
                mixed = 0.5 * a - 2.0 * self.project(outer)
                scale = a.norm().item() + outer.norm().item()
                assert_close(actual.to_dense(), mixed, dtype, scale)
                actual = A.from_inner(factor)
                assert_close(actual.to_dense(), self.project(inner), dtype, inner.norm().item())

    # --- numbers per matrix ---------------------------------------------------------------------

    @_examples
    @_arguments
    def test_traces_and_norms(
        self, batch: tuple[int, ...], n: int, dtype: torch.dtype, seed: int
    ) -> None:
        """average_trace, frobenius_norm and infinity_vector_norm are the dense ones, per matrix."""
        A = self._element(batch, n, dtype, seed)
        a = A.to_dense().double()
        trace = a.diagonal(dim1=-2, dim2=-1).sum(-1) / n
        assert_close(A.average_trace(), trace, dtype, a.norm().item())
        assert_close(A.frobenius_norm(), a.square().sum((-2, -1)).sqrt(), dtype)
        assert torch.equal(A.infinity_vector_norm().double(), a.abs().amax((-2, -1)))

    # --- stacks and copies ----------------------------------------------------------------------

    def test_rows_are_independent(self) -> None:
        """Indexing a stack commutes with every operation, and integers and slices give views."""
        A, B = (self._element((4,), 9, torch.float64, seed) for seed in (0, 1))
        X = self._random((4, 9, 3), torch.float64, 2)
        for i in range(4):
            dtype = torch.float64
            assert_close((A @ X)[i], A[i] @ X[i], dtype)
            assert_close((A @ B)[i].to_dense(), (A[i] @ B[i]).to_dense(), dtype)
            assert_close(A.from_inner(X)[i].to_dense(), A[i].from_inner(X[i]).to_dense(), dtype)
        A[1].mul_(0.0)
        A[2:].mul_(0.0)
        assert A[0].to_dense().any()
        assert not A[1:].to_dense().any()

    def test_copies_and_conversions(self) -> None:
        """clone, to, copy_, deepcopy, pickle and torch.save keep values and share no memory."""
        A = self._element((2,), 5, torch.float64, 0)
        before = A.to_dense()
        file = io.BytesIO()
        torch.save(A.named_tensors(), file)
        file.seek(0)
        copies = [
            A.clone(),
            copy.deepcopy(A),
            pickle.loads(pickle.dumps(A)),
            self.structure(*torch.load(file).values()),
            self.structure.zeros(5, (2,), dtype=torch.float64).copy_(A),
        ]
        half = A.to(torch.bfloat16)
        assert torch.equal(A.to(torch.float64).to_dense(), before)
        assert A.to(torch.zeros((), dtype=torch.float32)).dtype == torch.float32
        A.mul_(0.0)
        for other in copies:
            assert type(other) is self.structure
            assert torch.equal(other.to_dense(), before)
        assert half.dtype == torch.bfloat16
        assert_close(half.to_dense(), before, torch.bfloat16)
        assert A.nbytes == sum(t.nbytes for t in A.named_tensors().values())
