"""What factors cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from structprecond import (
    SOAP,
    DiagonalMatrix,
)
from structprecond.core.costs import count_entries
from structprecond.structures import structure_class


def params(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> nn.ParameterList:
    """Return parameters that take no memory, as a model."""
    return nn.ParameterList(
        nn.Parameter(torch.zeros(s, device="meta", dtype=dtype)) for s in shapes
    )


class Allocations(TorchDispatchMode):
    """Records the largest tensor with memory that an operation returns.

    But for `torch.empty`: what is never written to takes no memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        # kept, so that their addresses are not used again
        self.untouched: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and not t.is_meta:
                storage = t.untyped_storage()
                if "empty" in str(func):
                    self.untouched[storage.data_ptr()] = storage
                if storage.data_ptr() not in self.untouched:
                    self.largest = max(self.largest, storage.nbytes())
        return result


# --- counting ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        # the table of docs/structures.md
        ("dense", lambda n: n**2),
        ("diagonal", lambda n: n),
        ("block30diagonal", lambda n: n // 30 * 900 + (n % 30) ** 2),
        ("hierarchical4_5", lambda n: 4 * n + 5 * (n - 4) + (n - 9)),
        ("triltoeplitz", lambda n: n),
        ("triutopleftdiag", lambda n: 2 * n - 1),
    ],
)
@pytest.mark.parametrize("dim", [64, 10**7])
def test_counting_needs_no_memory(name: str, entries: Callable[[int], int], dim: int) -> None:
    count_entries.cache_clear()
    with Allocations() as seen:
        assert count_entries(structure_class(name), dim) == entries(dim)
    assert seen.largest == 0


def test_structures_that_look_at_values_count_as_dense() -> None:
    class Nosy(DiagonalMatrix):
        @classmethod
        def zeros(
            cls, dim: int, batch_shape: Any = (), dtype: Any = None, device: Any = None
        ) -> Any:
            assert torch.ones(1, device=device).item() == 1.0  # impossible without values
            return super().zeros(dim, batch_shape, dtype, device)

    assert count_entries(Nosy, 10**6) == 10**12


def test_construction_without_values_takes_no_memory() -> None:
    model = params((20_000, 8), (3000, 3000), (40,))
    with Allocations() as seen:
        given: Any = {"structures": "dense", "max_precond_dim": 10**6}
        SOAP(model, **given)
    assert seen.largest < 10_000  # counters
