"""What factors cost is said before the first step, and memory errors name the units."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import (
    KLSOAP,
    SOAP,
    AdamW,
    AdamWStrategy,
    DenseMatrix,
    DiagonalMatrix,
    KLShampoo,
    Muon,
    MuonStrategy,
    ScionStrategy,
    Shampoo,
    SIRFShampoo,
    SOAPStrategy,
    StackExperts,
    Strategy,
    StructuredOptimizer,
)
from structprecond.core import costs
from structprecond.core.bucket import BucketKey
from structprecond.core.costs import count_entries, step_operations
from structprecond.core.strategy import StepContext
from structprecond.linalg import precision
from structprecond.structures import structure_class
from tests.helpers import Allocations, set_grads


def sirf(model: nn.Module, **given: Any) -> SIRFShampoo:
    return SIRFShampoo(model, batch_size=4, **given)


FACADES: list[Callable[..., StructuredOptimizer]] = [SOAP, KLSOAP, KLShampoo, Shampoo, sirf]


def params(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> nn.ParameterList:
    """Return parameters that take no memory, as a model."""
    return nn.ParameterList(
        nn.Parameter(torch.zeros(s, device="meta", dtype=dtype)) for s in shapes
    )


def messages(make: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(*args, **kwargs)
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


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
    with precision.step_precision():
        pass  # the first time, some CPUs check what it does
    with Allocations() as seen:
        given: Any = {"structures": "dense", "max_precond_dim": 10**6}
        (message,) = messages(SOAP, model, **given)
    assert "20000x8" in message
    assert seen.largest < 10_000  # counters


# --- warnings ------------------------------------------------------------------------------------


def test_the_warning_names_units_costs_and_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10)).to("meta")
    (message,) = messages(SOAP, model, structures="dense")
    numbers = 2 * (128**2 + 9216**2) + 2 * 128 * 9216  # factors and bases, two moments
    steps = 10 * (128**3 + 9216**3) / (128 * 9216 * (20 + 6 * (128 + 9216)))
    assert f"0.weight (128x9216, dense dense): {4 * numbers / 2**20:.0f} MiB of state" in message
    assert f"{numbers / (128 * 9216):.0f} times the parameter" in message
    assert f"a refresh takes as long as {steps:.0f} steps" in message
    assert 'give structures="auto"' in message
    assert 'structures={1: "auto", 2: ("dense", "none")}' in message
    assert "set max_precond_dim below 9216" in message
    assert "2.weight" not in message


@pytest.mark.parametrize("make", FACADES)
def test_what_the_warning_advises_helps(make: Any) -> None:
    shapes = (64, 9000), (8000, 32), (30,)
    (message,) = messages(make, params(*shapes), structures="dense")
    assert "0 (64x9000" in message
    assert "1 (8000x32" in message
    # the first of the two is given as an example
    advised = re.search(r"structures=(\{.*?\})", message)
    assert advised is not None
    spec = ast.literal_eval(advised[1])
    assert spec == {1: "auto", 2: ("dense", "none")}
    assert not messages(make, params(*shapes[::2]), structures=spec)
    assert not messages(make, params(*shapes))
    limit = re.search(r"max_precond_dim below (\d+)", message)
    assert limit is not None
    assert int(limit[1]) == 8000
    assert not messages(make, params(*shapes), max_precond_dim=7999, structures="dense")


def test_advice_that_would_not_help_is_not_given() -> None:
    # short enough for "auto", and one of many
    (message,) = messages(SOAP, params(*[(1000, 2)] * 9, (3000, 20)), structures={2: "dense"})
    assert "9 (3000x20" in message
    assert "1000x2" not in message
    experts = nn.Parameter(torch.zeros(64, 1000, 2, device="meta"))
    model = nn.ParameterDict({"experts": experts})
    (message,) = messages(SOAP, model, combine_params=(StackExperts("experts"),))
    assert "experts (1000x2, dense dense)" in message
    assert "auto" not in message.split("To leave out")[1].split("structures={")[0]


@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        # more than 20 times, but not 64 MiB
        (SOAP, (2000, 40), ""),
        # more than 64 MiB, but not 20 times
        (SOAP, (4096, 4096), ""),
        # 62 MiB and 69 MiB
        (SOAP, (2800, 100), ""),
        (SOAP, (2950, 100), "MiB of state"),
        # an eigendecomposition takes more operations than an orthogonal iteration
        (Shampoo, (2850, 100), "a refresh takes as long as 172"),
        # 25 * 1500**3 operations are not worth a word, 1600**3 are
        (Shampoo, (1500, 10), ""),
        (Shampoo, (1600, 10), "a refresh takes as long as"),
        # whose refreshes decompose nothing
        (sirf, (2800, 10), ""),
    ],
)
def test_where_the_limits_are(make: Any, shape: tuple[int, ...], expected: str) -> None:
    found = messages(make, params(shape), structures="dense")
    assert bool(found) == bool(expected)
    assert expected in "".join(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [*FACADES, Muon, AdamW])
def test_defaults_are_never_expensive(make: Any, dtype: torch.dtype) -> None:
    lengths = (1, 3, 30, 128, 500, 1024, 1025, 4000, 9999, 60_000)
    shapes: list[tuple[int, ...]] = [(n, m) for n in lengths for m in lengths]
    shapes += [(n,) for n in lengths]
    shapes += [(n, m, 3, 3) for n in lengths for m in (1, 60, 200)]
    assert not messages(make, params(*shapes, dtype=dtype))


def test_one_warning_per_optimizer_names_the_units_of_all_groups() -> None:
    model = params((9000, 8), (8, 9001), (9002, 8))
    groups = [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(model)]
    (message,) = messages(SOAP, model, groups, structures="dense")
    for shape in ("9000x8", "8x9001", "9002x8"):
        assert shape in message


def test_long_lists_are_cut() -> None:
    model = params(*[(9000 + i, 8) for i in range(8)], *[(9500, 8)] * 7)
    (message,) = messages(SOAP, model, structures="dense")
    assert "9004x8" in message
    assert "9005x8" not in message
    assert "... and 4 more stacks" in message


# --- memory errors -------------------------------------------------------------------------------

ERRORS = {
    "of Python": MemoryError("no memory"),
    "of a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "of the CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
}


def failing(error: Exception, where: str) -> AdamWStrategy:
    """Return a strategy that raises an error in one of its methods."""

    def fail(self: Any, *args: Any) -> Any:
        raise error

    return type("Failing", (AdamWStrategy,), {where: fail})()


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("where", ["init", "begin", "update"])
def test_memory_errors_name_the_units(name: str, where: str) -> None:
    error = ERRORS[name]
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False))

    def run() -> None:
        optimizer = StructuredOptimizer(model, strategy=failing(error, where))
        set_grads(list(model.parameters()), 0)
        optimizer.step()

    with pytest.raises(type(error)) as caught:
        run()
    # tools that try again with smaller batches look for the type and the text
    assert type(caught.value) is type(error)
    assert str(caught.value).startswith(str(error))
    doing = "making the state" if where == "init" else "making a step"
    assert f"while {doing} of 0.weight, 1.weight (2x3, none none)." in str(caught.value)
    assert caught.value.__cause__ is error


def test_memory_errors_advise_where_factors_can_be_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("no memory")

    monkeypatch.setattr("structprecond.strategies.soap.make_factors", fail)
    with pytest.raises(MemoryError, match=r'\(4x9, dense dense\)\..*\{2: \("dense", "none"\)\}'):
        SOAP([nn.Parameter(torch.zeros(4, 9))])


def test_other_errors_stay_as_they_are() -> None:
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError) as caught:
        StructuredOptimizer(nn.Linear(3, 2), strategy=failing(error, "init"))
    assert caught.value is error


# --- steps ---------------------------------------------------------------------------------------


def products_of(strategy: Strategy[Any], *dims: int, structure: Any = None) -> int:
    """Return the operations of a step, less those of an entrywise one."""
    shape, order = torch.Size(dims), len(dims)
    dtypes = (torch.float32,) * order
    key = BucketKey(None, shape, (structure,) * order, dtypes, torch.float32, torch.device("cpu"))
    bare = replace(key, structures=(None,) * order)
    return step_operations(strategy, key) - step_operations(AdamWStrategy(), bare)


@pytest.mark.parametrize("strategy", [MuonStrategy(num_ns_steps=4), ScionStrategy(num_ns_steps=4)])
@pytest.mark.parametrize(("dims", "short", "long"), [((12, 8), 8, 12), ((8, 3, 2, 2), 8, 12)])
def test_operations_of_a_step_include_the_products_of_an_orthogonalization(
    strategy: MuonStrategy | ScionStrategy, dims: tuple[int, ...], short: int, long: int
) -> None:
    # X X^T, its square, and the product with X
    assert products_of(strategy, *dims) == 4 * 2 * short**2 * (2 * long + short)


def test_operations_do_not_count_the_check_of_the_precision() -> None:
    for cached in (precision._onednn_keeps_float32, precision._checked, costs.product_operations):
        cached.cache_clear()
    assert products_of(MuonStrategy(num_ns_steps=1), 8, 12) == 2 * 8**2 * (2 * 12 + 8)


def test_steps_of_other_norms_have_no_products() -> None:
    assert products_of(ScionStrategy(norm="row"), 12, 8) == 0


def test_operations_of_soap_are_two_rotations_and_the_factors() -> None:
    # a product with a square factor along an axis of length d takes 2 d operations per entry
    assert products_of(SOAPStrategy(), 12, 8, structure=DenseMatrix) == 12 * 8 * 6 * (12 + 8)
    assert products_of(SOAPStrategy(), 12, 8) == 0


@dataclass(frozen=True)
class LooksAtValues(SOAPStrategy):
    """Cannot run on the meta device."""

    def update(self, state: Any, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext) -> Tensor:
        assert grad.isfinite().all()
        return super().update(state, grad, hp, ctx)


def test_operations_of_a_strategy_that_looks_at_values_are_those_of_dense_rotations() -> None:
    assert products_of(LooksAtValues(), 12, 8, structure=DenseMatrix) == 12 * 8 * 6 * (12 + 8)
