"""The interface of all structured matrices, with a dense fallback of every operation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, ClassVar, Self, overload

import torch
from torch import Tensor

from structprecond.errors import StructureError
from structprecond.linalg.product import matmul


class StructuredMatrix(ABC):
    r"""A stack `(*b, n, n)` of matrices in a linear space that is closed under `@`.

    A structure is such a space, with a projection \(\Pi\) of symmetric matrices onto it. Subclasses
    are dataclasses (`@dataclass(eq=False)`). Their fields are tensors that depend linearly on the
    matrix; leading dimensions are the batch dimensions `*b`. A new structure needs only
    `from_dense` and `to_dense`. All other operations have dense fallbacks; override them for speed.

    Source: Lin et al. 2024 (arXiv 2312.05705), section 3.2 and figure 5.

    Example:
        >>> from structprecond import DiagonalMatrix
        >>> A = DiagonalMatrix.from_dense(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
        >>> (A @ A).to_dense()
        tensor([[4., 0.],
                [0., 9.]])
    """

    name: ClassVar[str]
    """The name in `structures=`. Default: the class's name."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Name the structure after its class unless it sets `name`."""
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    # --- the two methods that make a structure ---------------------------------------------------

    @classmethod
    @abstractmethod
    def from_dense(cls, sym_mat: Tensor) -> Self:
        r"""Project matrices onto the structure: \(\Pi(S)\).

        The projection is linear. If the space holds only one of two mirrored entries, it adds up
        both. So elements of the space stay as they are, and all dense fallbacks are correct.

        Args:
            sym_mat: Symmetric matrices `(*b, n, n)`, or dense elements of the space.

        Returns:
            The projection; never shares memory with `sym_mat`.
        """

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Return the matrices as a new tensor `(*b, n, n)`."""

    # --- derived from the fields -----------------------------------------------------------------

    def named_tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by field name; writing to them changes the matrix."""
        return {name: getattr(self, name) for name in _field_names(type(self))}

    def _map(self, fn: Callable[..., Tensor], *others: StructuredMatrix) -> Self:
        # called for every operation on small matrices, so it has to be fast
        matrices = (self, *others)
        names = _field_names(type(self))
        return type(self)(*[fn(*[getattr(m, name) for m in matrices]) for name in names])

    def _check_same(self, other: object) -> None:
        if type(other) is not type(self):
            raise StructureError(
                f"{self.name} can only be combined with {self.name}, got {type(other).__name__}. "
                "Convert with to_dense() and from_dense()."
            )

    @property
    def _first(self) -> Tensor:
        tensor: Tensor = getattr(self, _field_names(type(self))[0])
        return tensor

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the stored tensors."""
        return self._first.dtype

    @property
    def device(self) -> torch.device:
        """The device of the stored tensors."""
        return self._first.device

    @property
    def shape(self) -> torch.Size:
        """The shape `(*b, n, n)` of the dense stack."""
        return self.to_dense().shape

    @property
    def nbytes(self) -> int:
        """The size of the stored tensors in bytes."""
        return sum(t.numel() * t.element_size() for t in self.named_tensors().values())

    def __getitem__(self, rows: Any) -> Self:
        """Index the batch dimensions: a view for integers and slices, else a copy."""
        return self._map(lambda t: t[rows])

    def clone(self) -> Self:
        """Return a copy with memory of its own."""
        return self._map(torch.clone)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Convert all stored tensors like `torch.Tensor.to`; returns itself if nothing changes."""
        if not kwargs and len(args) == 1 and args[0] is self.dtype:
            return self
        return self._map(lambda t: t.to(*args, **kwargs))

    def copy_(self, other: Self) -> Self:
        """Overwrite with the values of `other`, keeping this matrix's memory, dtype and device."""
        self._check_same(other)
        self._map(lambda mine, theirs: mine.copy_(theirs), other)
        return self

    def __add__(self, other: Self) -> Self:
        self._check_same(other)
        return self._map(torch.add, other)

    def __sub__(self, other: Self) -> Self:
        self._check_same(other)
        return self._map(torch.sub, other)

    def __mul__(self, factor: float | Tensor) -> Self:
        """Return the product with a number, or one number per matrix `(*b,)`."""
        return self._map(lambda t: t * _per_matrix(factor, t))

    __rmul__ = __mul__

    def mul_(self, factor: float | Tensor) -> Self:
        """Multiply in place by a number, or one number per matrix `(*b,)`."""
        self._map(lambda t: t.mul_(_per_matrix(factor, t)))
        return self

    def add_(self, other: Self, alpha: float | Tensor = 1.0) -> Self:
        """Add `alpha * other` in place; `alpha` is a number or one number per matrix `(*b,)`."""
        self._check_same(other)
        if isinstance(alpha, Tensor):
            self._map(lambda mine, theirs: mine.addcmul_(theirs, _per_matrix(alpha, mine)), other)
        else:
            self._map(lambda mine, theirs: mine.add_(theirs, alpha=alpha), other)
        return self

    # --- constructors ----------------------------------------------------------------------------

    @classmethod
    def zeros(
        cls,
        dim: int,
        batch_shape: Sequence[int] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Return a stack `(*batch_shape, dim, dim)` of zero matrices."""
        one = cls.from_dense(torch.zeros(dim, dim, dtype=dtype, device=device))
        return one._map(lambda t: t.expand(*batch_shape, *t.shape).clone())

    @classmethod
    def eye(
        cls,
        dim: int,
        batch_shape: Sequence[int] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Return a stack `(*batch_shape, dim, dim)` of identity matrices."""
        return cls.zeros(dim, batch_shape, dtype, device).diag_add_(1.0)

    # --- multiplication --------------------------------------------------------------------------

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: Self) -> Self: ...
    def __matmul__(self, other: Self | Tensor) -> Self | Tensor:
        """Multiply by a tensor `(*b, n, m)` (dense result) or a matrix of this structure.

        Write `X @ A.T` as `(A @ X.mT).mT`: transposed views cost nothing.
        """
        if isinstance(other, Tensor):
            return self.matmat(other)
        self._check_same(other)
        return self._compose(other)

    def matmat(self, X: Tensor) -> Tensor:
        r"""Return \(A X\) for `X` of shape `(*b, n, m)`."""
        return matmul_like(self.to_dense(), X)

    def rmatmat(self, X: Tensor) -> Tensor:
        r"""Return \(A^\top X\) for `X` of shape `(*b, n, m)`."""
        return matmul_like(self.to_dense().mT, X)

    def outer_matmat(self, X: Tensor) -> Tensor:
        r"""Return \(A A^\top X\) for `X` of shape `(*b, n, m)`."""
        return self.matmat(self.rmatmat(X))

    def _compose(self, other: Self) -> Self:
        return self.from_dense(self.to_dense() @ other.to_dense())

    # --- projected inner products ----------------------------------------------------------------

    @classmethod
    def from_mat_inner(cls, X: Tensor) -> Self:
        r"""Return \(\Pi(X X^\top)\) for `X` of shape `(*b, n, m)`."""
        return cls.from_dense(matmul(X, X.mT))

    def from_inner(self, X: Tensor | None = None) -> Self:
        r"""Return \(\Pi(A^\top X X^\top A)\); `X` of shape `(*b, n, m)`, the identity if None."""
        return self.from_mat_inner(self.to_dense().mT if X is None else self.rmatmat(X))

    def add_inner_(self, X: Tensor, beta: float, alpha: float) -> Self:
        r"""Average in place: \(A \leftarrow \beta A + \alpha \Pi(X X^\top)\), X `(*b, n, m)`."""
        if X.dtype != self.dtype:
            return self.copy_(self.to(X.dtype).add_inner_(X, beta, alpha))
        return self.mul_(beta).add_(self.from_mat_inner(X), alpha=alpha)

    @classmethod
    def refresh_cost(cls, dim: int) -> int:
        """Return the operations of a decomposition of size `dim`, up to a constant factor."""
        return dim**3

    # --- numbers per matrix ----------------------------------------------------------------------

    def diag_add_(self, value: float | Tensor) -> Self:
        """Add a number, or one number per matrix `(*b,)`, to every diagonal entry in place."""
        dense = self.to_dense()
        diagonal = dense.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(_per_matrix(value, diagonal))
        return self.copy_(self.from_dense(dense))

    def average_trace(self) -> Tensor:
        r"""Return \(\mathrm{tr}(A) / n\), shape `(*b,)`."""
        return self.to_dense().diagonal(dim1=-2, dim2=-1).mean(-1)

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norms, shape `(*b,)`."""
        norms: Tensor = torch.linalg.vector_norm(self.to_dense(), dim=(-2, -1))
        return norms

    def infinity_vector_norm(self) -> Tensor:
        """Return the largest absolute entries, shape `(*b,)`."""
        return self.to_dense().abs().amax(dim=(-2, -1))


@cache
def _field_names(structure: type[StructuredMatrix]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(structure))  # type: ignore[arg-type]


class EntrywiseMatrix(StructuredMatrix):
    """A structure whose entries are each zero or stored exactly once."""

    def _entries(self) -> Tensor:
        """Return all stored entries, shape `(*b, entries)`; a view if there is one field."""
        batch_ndim = len(self.shape) - 2
        entries = [t.flatten(batch_ndim) for t in self.named_tensors().values()]
        return torch.cat(entries, dim=-1) if len(entries) > 1 else entries[0]

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norms, shape `(*b,)`."""
        norms: Tensor = torch.linalg.vector_norm(self._entries(), dim=-1)
        return norms

    def infinity_vector_norm(self) -> Tensor:
        """Return the largest absolute entries, shape `(*b,)`."""
        return self._entries().abs().amax(-1)


def matmul_like(A: Tensor, X: Tensor) -> Tensor:
    """Return `A @ X` in the memory layout of X: a transposed view gives a transposed view."""
    return matmul(X.mT, A.mT).mT if is_transposed(X) else matmul(A, X)


def is_transposed(X: Tensor) -> bool:
    """Return whether columns are contiguous in memory, and rows are not."""
    return bool(X.stride(-2) == 1 < X.stride(-1))


def _per_matrix(value: float | Tensor, like: Tensor) -> float | Tensor:
    """Reshape one number per matrix `(*b,)` to broadcast against a field `(*b, ...)`."""
    if not isinstance(value, Tensor):
        return value
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)).to(like.dtype)
