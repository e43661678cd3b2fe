"""Decompositions that fail and gradients that overflow: what happens to whom, and what is told."""

from __future__ import annotations

import copy
import io
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from structprecond import (
    KLSOAP,
    SOAP,
    AdamW,
    DecompositionError,
    GradientError,
    KLShampoo,
    Muon,
    PerParameter,
    Shampoo,
    SIRFShampoo,
    SplitHeads,
    StructuredOptimizer,
)
from structprecond.core.bucket import Bucket
from structprecond.linalg import eigh, matrix_inverse_root, orthogonal_iteration
from structprecond.linalg import roots as roots_module
from tests.helpers import same_bits, set_grads, snapshot
from tests.strategies.test_protocol_of_all import MAKERS

ROWS, STEPS, DUE, FAULT = 4, 12, (3, 6, 9), 6

Make = Callable[..., StructuredOptimizer]
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
    """Lets a decomposition fail for some rows of the first stacks of `ROWS` rows that it sees.

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
        # matrices are known by their values, whatever stack they come in
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


def _model() -> nn.ParameterList:
    generator = torch.Generator().manual_seed(0)
    # of even order, so that all blocks have the same size
    return nn.ParameterList([torch.randn(6, 4, generator=generator) for _ in range(ROWS)])


def _train(
    make: Make,
    due: tuple[int, ...] = DUE,
    fault: Fault | None = None,
    at: tuple[int, ...] = (FAULT,),
    touch: Callable[[StructuredOptimizer], None] = lambda optimizer: None,
) -> tuple[nn.ParameterList, StructuredOptimizer, dict[str, Any]]:
    """Train, with a fault at some steps; return the state just after the first of these too."""
    model = _model()
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
    _, _, healthy = _train(make)
    *_, kept = _train(make, due=tuple(step for step in DUE if step != FAULT))
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
    healthy, same, _ = _train(make)
    kept, without, _ = _train(make, due=tuple(step for step in DUE if step != FAULT))
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
    *_, healthy = _train(make)
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
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = SOAP(_model())
    fresh.load_state_dict(torch.load(file))
    assert fresh.failed == len(DUE)
    assert [int(entry["failed"]) for entry in fresh.state.values()] == [0, len(DUE), 0, 0]


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
    model = _model()
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


# --- gradients that overflow ---------------------------------------------------------------------

HUGE = (1e10, 1e15, 1e19, 1e25, 3e38)
TINY = (1e-20, 1e-30, 1e-44)
ROBUST: dict[str, Any] = {
    **MAKERS,
    "Shampoo coupled Newton": partial(Shampoo, root="coupled_newton", precondition_frequency=3),
    "Shampoo Newton-DB": partial(
        Shampoo, root="newton_db", exponent=0.25, precondition_frequency=3
    ),
}


def _numbers(optimizer: StructuredOptimizer) -> Iterator[Tensor]:
    for bucket in optimizer.buckets:
        yield from bucket.params
        yield from bucket.state.named_tensors().values()


@pytest.mark.parametrize("make", ROBUST.values(), ids=ROBUST.keys())
@pytest.mark.parametrize("size", HUGE + TINY)
@pytest.mark.filterwarnings("ignore:The gradients of .* are too large to compute with")
def test_everything_stays_finite_and_training_goes_on(make: Make, size: float) -> None:
    for when in ((0,), (5,), (5, 6, 7)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Linear(12, 5), nn.Linear(5, 5))
        optimizer = make(model)
        for step in range(14):
            set_grads(list(model.parameters()), step)
            for p in model.parameters():
                if step in when:
                    assert p.grad is not None
                    p.grad.sign_().mul_(size)
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
            assert all(t.isfinite().all() for t in _numbers(optimizer)), (when, step)
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        # what a second moment of 1e37 divides may be too small a step to see, as with torch's AdamW
        assert size >= 1e10 or all(moved)
        assert optimizer.failed == 0
        assert size > 1e16 or optimizer.skipped == 0


@pytest.mark.parametrize("make", [SOAP, KLSOAP, KLShampoo, Shampoo, AdamW])
def test_a_gradient_that_overflows_is_as_one_that_is_not_finite(make: Make) -> None:
    results = []
    for value in (3e38, torch.nan):
        model = _model()
        optimizer = make(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(9):
                set_grads(list(model), step)
                if step in (4, 5):
                    assert model[1].grad is not None
                    model[1].grad.fill_(value)
                optimizer.step()
        assert len(caught) == 1
        assert re.match("The gradients of 1 are .* at step 4", str(caught[0].message))
        assert caught[0].filename == __file__
        results.append({**snapshot(model, optimizer), "groups": None})
        assert optimizer.skipped == 2 == int(optimizer.state[model[1]]["skipped"])
    assert same_bits(*results)


def test_large_gradients_that_do_no_harm_are_used() -> None:
    # without epsilon and decay, SOAP does not see the scale
    moves = []
    for scale in (1.0, 1e12):
        p = nn.Parameter(torch.zeros(4, 4))
        optimizer = SOAP([p], lr=0.01, eps=0.0, weight_decay=0.0, precondition_frequency=2)
        for step in range(6):
            set_grads([p], step)
            assert p.grad is not None
            p.grad.mul_(scale)
            optimizer.step()
        assert optimizer.skipped == 0
        moves.append(p.detach())
    assert torch.allclose(moves[0], moves[1], rtol=1e-3)


def test_overflow_depends_on_the_strategy_and_the_step() -> None:
    # the momentum of 1e30 is finite, only the factors that a refresh squares it for are not
    p = nn.Parameter(torch.zeros(4))
    optimizer = SIRFShampoo([p], batch_size=1, lr=1e-33, T=lambda step: step == 1)
    p.grad = torch.full_like(p, 1e30)
    optimizer.step()
    assert optimizer.skipped == 0
    assert p[0].item() == pytest.approx(-1e-3)
    with pytest.warns(UserWarning, match="too large to compute with"):
        optimizer.step()
    assert optimizer.skipped == 1
    p.grad.fill_(1.0)
    optimizer.step()
    assert (optimizer.global_step, int(optimizer.state[p]["step"])) == (3, 2)


def test_gradients_whose_own_squares_are_finite_may_overflow_too() -> None:
    # the eigenvalues of 1e-12 magnify gradients 1e6 times before they are squared
    model = _model()
    optimizer = KLShampoo(model, init_factor=1e-12, clamping=False)
    for step in range(4):
        set_grads(list(model), step)
        if step == 1:
            model[3].grad.fill_(1e14)
            with pytest.warns(UserWarning, match="gradients of 3 are too large"):
                optimizer.step()
        else:
            optimizer.step()
    assert optimizer.skipped == 1
    assert all(t.isfinite().all() for t in _numbers(optimizer))


def test_overflow_raises_where_that_is_wanted_and_changes_nothing() -> None:
    model = _model()
    optimizer = KLSOAP(model, nonfinite="raise")
    for step in range(3):
        set_grads(list(model), step)
        optimizer.step()
    model[2].grad.fill_(1e30)
    before = snapshot(model, optimizer)
    with pytest.raises(GradientError, match=r"gradients of 2 are too large .* step 3; nothing"):
        optimizer.step()
    assert same_bits(snapshot(model, optimizer), before)


def test_overflow_is_let_through_where_checks_are_ignored() -> None:
    model = _model()
    optimizer = AdamW(model, nonfinite="ignore")
    set_grads(list(model), 0)
    model[2].grad.fill_(3e38)
    optimizer.step()
    assert optimizer.skipped == 0
    assert optimizer.state[model[2]]["exp_avg_sq"].isinf().all()


def test_parameters_of_half_precision_do_not_overflow() -> None:
    p = nn.Parameter(torch.ones(8, 8, dtype=torch.float16))
    q = nn.Parameter(torch.ones(8, 8, dtype=torch.float16))
    optimizer = Muon([{"params": [p]}, {"params": [q]}], lr=1e6)
    p.grad, q.grad = torch.full_like(p, 6e4), torch.full_like(q, 1e-4)
    with pytest.warns(UserWarning, match=r"param_groups\[0\].* too large"):
        optimizer.step()
    assert p.isfinite().all()


@pytest.mark.parametrize("maximize", [False, True])
def test_a_trial_with_large_gradients_leaves_the_gradients_as_they_are(maximize: bool) -> None:
    models = []
    for nonfinite in ("skip", "ignore"):
        model = _model()
        optimizer = SOAP(model, eps=0.0, weight_decay=0.0, maximize=maximize, nonfinite=nonfinite)
        for step in range(4):
            set_grads(list(model), step)
            for p in model:
                assert p.grad is not None
                p.grad.mul_(1e12)  # too large to be sure, but not too large
            optimizer.step()
        assert optimizer.skipped == 0
        models.append(model)
    for p, q in zip(*models, strict=True):
        assert torch.equal(p, q)


def test_what_stands_in_the_rows_of_frozen_units_does_not_matter() -> None:
    model = _model()
    optimizer = AdamW(model)
    set_grads(list(model), 0)
    model[1].grad = None
    # memory that was not written holds NaN then
    torch.use_deterministic_algorithms(True)
    try:
        optimizer.step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert optimizer.skipped == 0
    assert optimizer.state[model[0]]["step"] == 1
    assert optimizer.state[model[1]]["step"] == 0


def test_stacks_of_gradients_are_freed_as_soon_as_they_were_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stacks: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    gather, step = Bucket.gather, Bucket.step

    def watched_gather(bucket: Bucket, live: Any) -> Tensor:
        stack = gather(bucket, live)
        stacks.append(weakref.ref(stack))
        return stack

    def watched_step(bucket: Bucket, *args: Any) -> None:
        step(bucket, *args)
        alive.append(sum(stack() is not None for stack in stacks))

    params = [nn.Parameter(torch.randn(n, 2)) for n in (2, 3, 4)]
    optimizer = AdamW(params)
    set_grads(params, 0)
    monkeypatch.setattr(Bucket, "gather", watched_gather)
    monkeypatch.setattr(Bucket, "step", watched_step)
    optimizer.step()
    assert alive == [3, 2, 1]
    assert [stack() for stack in stacks] == [None] * 3


def test_gradients_that_the_stack_cannot_hold_are_skipped() -> None:
    model = _model()
    optimizer = AdamW(model)
    model.double()  # the state stays in float32
    set_grads(list(model), 0)
    model[2].grad.fill_(1e50)
    before = [p.detach().clone() for p in model]
    with pytest.warns(UserWarning, match="gradients of 2 are too large"):
        optimizer.step()
    assert optimizer.skipped == 1
    assert [bool(torch.equal(p, q)) for p, q in zip(model, before, strict=True)] == [
        False, False, True, False,
    ]  # fmt: skip
