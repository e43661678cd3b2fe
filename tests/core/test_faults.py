"""Failed decompositions leave their rows unchanged and warn once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from structprecond import (
    KLSOAP,
    SOAP,
    DecompositionError,
    KLShampoo,
    PerParameter,
    Shampoo,
    SplitHeads,
    StructuredOptimizer,
)
from structprecond.linalg import eigh, matrix_inverse_root, orthogonal_iteration
from structprecond.linalg import roots as roots_module
from tests.every_strategy import Make
from tests.helpers import matrices, same_bits, set_grads, snapshot, through_a_file

ROWS, STEPS, DUE, FAULT = 4, 12, (3, 6, 9), 6
REFRESHED: dict[str, tuple[Make, Any, str]] = {
    "SOAP": (SOAP, torch, "geqrf"),
    "SOAP transport": (partial(SOAP, transport=True, skip_first=False), torch, "geqrf"),
    "SOAP blocks": (partial(SOAP, structures={2: "block2diagonal"}), torch, "geqrf"),
    "SOAP tolerance": (partial(SOAP, refresh_tolerance=1e-9), torch, "geqrf"),
    "KL-SOAP": (KLSOAP, torch, "geqrf"),
    "KL-Shampoo": (KLShampoo, torch, "geqrf"),
    "Shampoo": (Shampoo, torch.linalg, "eigh"),
    "Shampoo blocks": (partial(Shampoo, structures={2: "block2diagonal"}), torch.linalg, "eigh"),
    "Shampoo coupled Newton": (
        partial(Shampoo, root="coupled_newton"), roots_module, "_coupled_newton"
    ),
    "Shampoo Newton-DB": (partial(Shampoo, root="newton_db"), roots_module, "_newton_db"),
}  # fmt: skip
refreshed = pytest.mark.parametrize(
    ("make", "owner", "function"), REFRESHED.values(), ids=REFRESHED.keys()
)


@dataclass
class Fault:
    """Makes a decomposition fail for some rows of the first stacks with `ROWS` rows.

    Args:
        owner: The module of the decomposition.
        function: Its name.
        rows: The rows that fail.
        size: Only matrices of this size fail.
        raises: Whether it raises, as LAPACK does, or returns NaN.
        double: Whether it fails in float64 too.
    """

    owner: Any
    function: str
    rows: list[int]
    size: int = 5
    raises: bool = True
    double: bool = True
    seen: list[torch.dtype] = field(default_factory=list)

    def __enter__(self) -> None:
        self.real = getattr(self.owner, self.function)
        self.bad: list[Tensor] = []
        setattr(self.owner, self.function, self)

    def __exit__(self, *_: object) -> None:
        setattr(self.owner, self.function, self.real)

    def __call__(self, stack: Tensor, *args: Any) -> Any:
        self.seen.append(stack.dtype)
        if stack.shape[0] == ROWS and stack.shape[-1] == self.size:
            self.bad += [stack[row].clone() for row in self.rows]
        # matrices are recognized by their values in any stack
        hit = [any(torch.equal(m.float(), bad) for bad in self.bad) for m in stack]
        if not any(hit) or not (self.double or stack.dtype == torch.float32):
            return self.real(stack, *args)
        if self.raises:
            raise LinAlgError("The algorithm failed to converge")
        results = self.real(stack, *args)
        spoiled = torch.tensor(hit)
        if isinstance(results, Tensor):
            return results.index_fill(0, spoiled.nonzero().squeeze(1), torch.nan)
        return tuple(t.index_fill(0, spoiled.nonzero().squeeze(1), torch.nan) for t in results)


def _train(
    make: Make,
    due: tuple[int, ...] = DUE,
    fault: Fault | None = None,
    at: tuple[int, ...] = (FAULT,),
    touch: Callable[[StructuredOptimizer], None] = lambda optimizer: None,
) -> tuple[nn.ParameterList, StructuredOptimizer, dict[str, Any]]:
    """Train with a fault at some steps; also return the state after the first of them."""
    model = matrices()
    optimizer = make(model, precondition_frequency=lambda step: step in due)
    just_after: dict[str, Any] = {}
    for step in range(STEPS):
        set_grads(list(model), step)
        if fault is not None and step in at:
            with fault:
                optimizer.step()
        else:
            optimizer.step()
        if step == at[0]:
            touch(optimizer)
            just_after = snapshot(model, optimizer)
    return model, optimizer, just_after


@cache
def _without_fault(
    make: Make, due: tuple[int, ...] = DUE
) -> tuple[nn.ParameterList, StructuredOptimizer, dict[str, Any]]:
    """Train without a fault, once for all tests that compare with this."""
    return _train(make, due)


def _unit(shown: dict[str, Any], row: int) -> dict[str, Any]:
    """Return a unit's parameter and state, without the counter of failures."""
    state = {name: t for name, t in shown["shown"][str(row)].items() if name != "failed"}
    return {"parameter": shown["params"][str(row)], **state}


# --- decompositions ------------------------------------------------------------------------------


@refreshed
@pytest.mark.parametrize("raises", [True, False], ids=["raises", "NaN"])
@pytest.mark.parametrize("rows", [[1], [0, 3], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_that_fail_stay_as_they_are_and_the_others_are_refreshed(
    make: Make, owner: Any, function: str, raises: bool, rows: list[int], axis: int
) -> None:
    if function.startswith("_") and raises:
        pytest.skip("iterations do not raise")
    blocks = isinstance(make, partial) and "structures" in make.keywords
    if blocks and axis == 1:
        pytest.skip("the blocks of all axes have one size")
    fault = Fault(owner, function, rows, size=2 if blocks else (6, 4)[axis], raises=raises)
    with pytest.warns(UserWarning, match="could not be decomposed at step 6") as caught:
        model, optimizer, just_after = _train(make, fault=fault)
    assert fault.bad
    _, _, healthy = _without_fault(make)
    *_, kept = _without_fault(make, due=tuple(step for step in DUE if step != FAULT))
    for row in range(ROWS):
        expected, other = (kept, healthy) if row in rows else (healthy, kept)
        assert same_bits(_unit(just_after, row), _unit(expected, row))
        assert not same_bits(_unit(just_after, row), _unit(other, row))
        assert int(optimizer.state[model[row]]["failed"]) == (row in rows)
    assert optimizer.failed == len(rows)
    assert optimizer.skipped == 0
    names = ", ".join(map(str, rows))
    assert [str(w.message).split(" could")[0] for w in caught] == [f"Matrices of {names}"]
    assert caught[0].filename == __file__


@refreshed
def test_failed_rows_recover_at_the_next_refresh(make: Make, owner: Any, function: str) -> None:
    blocks = isinstance(make, partial) and "structures" in make.keywords
    fault = Fault(owner, function, [1], size=2 if blocks else 6, raises=False)
    with pytest.warns(UserWarning, match="could not be decomposed"):
        model, optimizer, _ = _train(make, fault=fault)
    healthy, same, _ = _without_fault(make)
    kept, without, _ = _without_fault(make, due=tuple(step for step in DUE if step != FAULT))
    for row in range(ROWS):
        expected, theirs = (kept, without) if row == 1 else (healthy, same)
        assert torch.equal(model[row], expected[row])
        mine, other = (dict(o.state[m[row]]) for o, m in ((optimizer, model), (theirs, expected)))
        assert same_bits(mine | {"failed": 0}, other | {"failed": 0})
        assert all(t.isfinite().all() for t in mine.values())


@refreshed
@pytest.mark.parametrize("raises", [True, False], ids=["raises", "NaN"])
def test_what_fails_in_float32_is_computed_in_float64(
    make: Make, owner: Any, function: str, raises: bool
) -> None:
    blocks = isinstance(make, partial) and "structures" in make.keywords
    fault = Fault(owner, function, [1], size=2 if blocks else 6, raises=raises, double=False)
    _, optimizer, just_after = _train(make, fault=fault)
    assert fault.seen.count(torch.float64) >= 1
    assert optimizer.failed == 0
    *_, healthy = _without_fault(make)
    for row in range(ROWS):
        mine, expected = _unit(just_after, row), _unit(healthy, row)
        assert row == 1 or same_bits(mine, expected)
        for name, value in mine.items():
            assert value.dtype == expected[name].dtype
            assert torch.allclose(value, expected[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("make", [SOAP, KLShampoo, KLSOAP])
@pytest.mark.parametrize("function", ["svd", "eigh"], ids=["long axis", "short axis"])
def test_rows_that_fail_at_the_first_gradient_start_from_the_identity(
    make: Make, function: str
) -> None:
    fault = Fault(torch.linalg, function, [0, 2], size=4)
    with pytest.warns(UserWarning, match="Matrices of 0, 2 could not be decomposed at step 0"):
        model, optimizer, _ = _train(make, fault=fault, at=(0,))

    def without_bases(optimizer: StructuredOptimizer) -> None:
        for p in (params := optimizer.param_groups[0]["params"])[0], params[2]:
            for axis, dim in enumerate(p.shape):
                optimizer.state[p][f"bases.{axis}.mat"] = torch.eye(dim)

    expected, other, _ = _train(make, at=(0,), touch=without_bases)
    assert same_bits([p.detach() for p in model], [p.detach() for p in expected])
    assert optimizer.failed == 2
    assert other.failed == 0


@pytest.mark.parametrize("structure", ["dense", "block2diagonal"])
def test_one_head_of_a_unit_fails_alone(structure: str) -> None:
    model = nn.ParameterDict({"qkv": torch.randn(4 * ROWS, 4)})
    rules = (SplitHeads("qkv", ROWS), PerParameter())
    optimizer = SOAP(model, combine_params=rules, precondition_frequency=1, structures=structure)
    size = 2 if structure == "block2diagonal" else 4
    set_grads(list(model.values()), 0)
    optimizer.step()
    with Fault(torch, "geqrf", [2], size=size):
        with pytest.warns(UserWarning, match="Matrices of qkv could"):
            optimizer.step()
        optimizer.step()
    assert optimizer.state[model["qkv"]]["failed"].tolist() == [0, 0, 2, 0]
    assert optimizer.failed == 2


def test_failures_are_warned_of_once_and_remembered() -> None:
    fault = Fault(torch, "geqrf", [1], size=6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, optimizer, _ = _train(SOAP, fault=fault, at=DUE)
        duplicate = copy.deepcopy(optimizer)
    assert len(caught) == 1
    assert optimizer.failed == duplicate.failed == len(DUE)
    fresh = SOAP(matrices())
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert fresh.failed == len(DUE)
    assert [int(entry["failed"]) for entry in fresh.state.values()] == [0, len(DUE), 0, 0]


def test_a_unit_that_fails_twice_in_a_step_is_named_once() -> None:
    model = matrices()
    optimizer = SOAP(model, skip_first=False, precondition_frequency=1)
    set_grads(list(model), 0)
    first, refresh = Fault(torch.linalg, "svd", [1], size=4), Fault(torch, "geqrf", [1], size=4)
    with first, refresh, pytest.warns(UserWarning, match="Matrices of 1 could not"):
        optimizer.step()
    assert first.bad
    assert refresh.bad
    assert optimizer.failed == 2


@pytest.mark.filterwarnings("ignore:Matrices of 2 could not be decomposed")
@pytest.mark.parametrize(
    "make",
    [
        partial(SOAP, refresh_tolerance=0.1),
        KLSOAP,
        KLShampoo,
        Shampoo,
        partial(Shampoo, root="coupled_newton"),
    ],
)
def test_a_factor_that_is_not_finite_does_not_reach_the_parameters(make: Make) -> None:
    model = matrices()
    optimizer = make(model, precondition_frequency=2)
    for step in range(9):
        set_grads(list(model), step)
        if step == 3:
            optimizer.state[model[2]]["factors.0.mat"].fill_(torch.nan)
        optimizer.step()
        assert all(p.isfinite().all() for p in model)
    assert optimizer.failed == 3 == int(optimizer.state[model[2]]["failed"])


@pytest.mark.parametrize(
    "decompose",
    [
        eigh,
        lambda A: orthogonal_iteration(A, torch.eye(4).expand_as(A)),
        lambda A: matrix_inverse_root(A, 4),
        lambda A: matrix_inverse_root(A, 4, method="coupled_newton"),
        lambda A: matrix_inverse_root(A, 4, method="newton_db"),
    ],
)
def test_functions_on_tensors_name_the_rows(decompose: Callable[[Tensor], Any]) -> None:
    for shape in [(3, 4, 4), (3, 2, 4, 4)]:
        A = torch.eye(4).expand(shape).clone()
        A[1].view(-1)[-1] = torch.nan
        with pytest.raises(DecompositionError, match=r"matrices \[1\]") as error:
            decompose(A)
        assert error.value.rows == [1]
    with pytest.raises(DecompositionError):
        decompose(A[1, -1])
