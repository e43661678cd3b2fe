"""Products of stacks: equal to `@`, with strides at which oneDNN is fast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Size, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from structprecond import SOAP, DenseMatrix, KLShampoo, Muon, Shampoo, SIRFShampoo
from structprecond.linalg.product import matmul

PRODUCTS = ("bmm", "baddbmm")


class _Operands(TorchDispatchMode):
    """Collects the shapes and strides of the operands of batched products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Size, tuple[int, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            self.seen += [(t.shape, t.stride()) for t in args if isinstance(t, Tensor)]
        return func(*args, **(kwargs or {}))

    def check(self) -> None:
        assert self.seen
        for shape, strides in self.seen:
            assert strides[0] >= shape[1] * shape[2], (shape, strides)


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3)])
def test_products_are_those_of_torch(batch: tuple[int, ...]) -> None:
    A, B = (torch.randn(*batch, *dims, dtype=torch.float64) for dims in ((4, 5), (4, 6)))
    assert torch.equal(matmul(A.mT, B), A.mT @ B)


def test_a_stack_is_multiplied_with_a_single_matrix() -> None:
    A, B = torch.randn(3, 4, 5), torch.randn(1, 5, 2)
    assert torch.equal(matmul(A, B), A @ B)
    assert torch.equal(matmul(A, B[0]), A @ B[0])


def test_one_transposed_matrix_keeps_the_stride_of_a_stack() -> None:
    A, wide, tall = DenseMatrix(torch.randn(1, 6, 6)), torch.randn(1, 6, 9), torch.randn(1, 9, 6)
    with _Operands() as operands:
        for X in (wide, tall.mT):
            A.matmat(X)
            A.rmatmat(X)
            A.outer_matmat(X)
            A.add_inner_(X, 0.9, 0.1)
    operands.check()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SOAP(p, precondition_frequency=1),
        lambda p: SIRFShampoo(p, batch_size=4),
        lambda p: SIRFShampoo(p, batch_size=4, structures="hierarchical2_3"),
        lambda p: Shampoo(p, precondition_frequency=1),
        lambda p: KLShampoo(p, precondition_frequency=1),
        lambda p: SOAP(p, precondition_frequency=1, transport=True, refresh_tolerance=1e-9),
        lambda p: Muon([("w", p[0])], fp32_matmul_prec="highest"),
    ],
)
@pytest.mark.parametrize("shape", [(8, 16), (16, 8), (8, 9, 3, 3)])
def test_steps_of_a_single_layer_do_so(make: Any, shape: tuple[int, ...]) -> None:
    param = nn.Parameter(torch.randn(shape))
    optimizer = make([param])
    for _ in range(2):
        param.grad = torch.randn(shape)
        optimizer.step()
    param.grad = torch.randn(shape)
    with _Operands() as operands:
        optimizer.step()
    operands.check()
