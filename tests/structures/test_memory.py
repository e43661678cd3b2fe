"""Structured operations form no large n x n matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from structprecond.structures import SUPPORTED_STRUCTURES, structure_class

N, COLUMNS = 2000, 4
NAMES = [name for name in SUPPORTED_STRUCTURES if name not in ("dense", "none")]


class _LargestResult(TorchDispatchMode):
    """Records the size of the largest tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.numel = max([self.numel, *made])
        return result


@pytest.mark.parametrize("columns", [1, COLUMNS, 40])
@pytest.mark.parametrize("name", NAMES)
def test_no_operation_forms_a_square_matrix(name: str, columns: int) -> None:
    structure = structure_class(name.replace("<k>", "30").replace("<k1>_<k2>", "15_15"))
    X = torch.randn(N, columns)
    with _LargestResult() as seen:
        A = structure.eye(N) * 2.0
        A = A.add_(structure.from_mat_inner(X), alpha=-0.1)
        A.diag_add_(1.0)
        A @ A, A.from_inner(), A.from_inner(X)
        A @ X, A.rmatmat(X), A.outer_matmat(X), (A @ X.mT.contiguous().mT)
        A.average_trace(), A.frobenius_norm(), A.infinity_vector_norm()
    # at most FFTs of 40 columns at twice their length
    assert seen.numel <= 140 * N
    assert seen.numel < N * N / 10
