"""`structures="auto"`: what each axis gets by default, and what named structures change."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from structprecond import (
    KLSOAP,
    SOAP,
    AdamW,
    CheckpointError,
    HyperparameterError,
    KLShampoo,
    MergeDims,
    Shampoo,
    SIRFShampoo,
    SIRFShampooStrategy,
    SOAPStrategy,
    StructuredOptimizer,
    StructureError,
    describe,
)
from tests.helpers import same_bits, set_grads, values

FACADES = [SOAP, KLSOAP, KLShampoo, Shampoo, SIRFShampoo]


def params(*shapes: tuple[int, ...]) -> nn.ParameterList:
    """Return parameters that take no memory, as a model."""
    return nn.ParameterList(nn.Parameter(torch.zeros(s, device="meta")) for s in shapes)


def chosen(optimizer: StructuredOptimizer) -> list[tuple[str, ...]]:
    return [row.structures for row in describe(optimizer).rows]


def choice(make: Callable[..., StructuredOptimizer], *shape: int, **given: Any) -> tuple[str, ...]:
    """Return the names of the structures that a parameter of a shape gets."""
    (structures,) = chosen(make(params(shape), **given))
    return structures


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 64), "dense dense"),
        ((128, 9216), "dense none"),
        ((50_000, 64), "none dense"),
        # up to 1024 always
        ((1024, 2), "dense dense"),
        ((1025, 2), "none dense"),
        # up to 8 times the others, all of them together
        ((1032, 129), "dense dense"),
        ((1033, 129), "none dense"),
        ((2000, 10, 5, 5), "dense dense dense dense"),
        ((2001, 10, 5, 5), "none dense dense dense"),
        ((3, 5000, 3), "dense none dense"),
        # up to max_precond_dim
        ((10_000, 5000), "dense dense"),
        ((10_001, 5000), "none dense"),
    ],
)
def test_what_a_factor_costs_decides(shape: tuple[int, ...], expected: str) -> None:
    assert choice(SOAP, *shape) == tuple(expected.split())


def instead(make: Any) -> str:
    """Return what an axis gets for which a dense factor costs too much."""
    return "diagonal" if make is KLShampoo else "none"


@pytest.mark.parametrize("make", FACADES)
def test_it_is_the_default_of_every_optimizer_with_factors(make: Any) -> None:
    assert inspect.signature(make).parameters["structures"].default == "auto"
    assert choice(make, 128, 9216) == ("dense", instead(make))
    assert choice(make, 128, 9216, structures="auto") == ("dense", instead(make))
    assert choice(make, 128, 10_001) == ("dense", "none")


def test_it_is_the_default_of_the_core_too() -> None:
    optimizer = StructuredOptimizer(params((9216, 128)), strategy=SOAPStrategy())
    assert chosen(optimizer) == [("none", "dense")]
    assert AdamW(params((9216, 128))).param_groups[0]["structures"] == "auto"


@pytest.mark.filterwarnings("ignore:Some Kronecker factors are expensive")
@pytest.mark.parametrize("make", FACADES)
def test_named_structures_are_done_as_named(make: Any) -> None:
    assert choice(make, 128, 1200, structures="dense") == ("dense", "dense")
    assert choice(make, 128, 1200, structures={2: ("auto", "dense")}) == ("dense", "dense")
    assert choice(make, 128, 1200, structures={2: ("none", "auto")}) == ("none", instead(make))
    assert choice(make, 128, 1200, structures={2: "auto"}) == ("dense", instead(make))
    assert choice(make, 128, 1200, structures="diagonal") == ("diagonal", "diagonal")
    model = params((128, 1200), (1200, 128))
    groups = [{"params": [model[0]]}, {"params": [model[1]], "structures": "dense"}]
    optimizer = make(model, groups)
    assert chosen(optimizer) == [("dense", instead(make)), ("dense", "dense")]


def test_what_auto_chooses_trains_as_what_is_named() -> None:
    models = []
    for structures in ("auto", {2: ("dense", "none")}):
        p = nn.Parameter(torch.ones(3, 1100))
        optimizer = SOAP([p], lr=0.1, structures=structures, precondition_frequency=2)
        for step in range(4):
            set_grads([p], step)
            optimizer.step()
        models.append([p])
    assert same_bits(*map(values, map(nn.ParameterList, models)))


# --- vectors -------------------------------------------------------------------------------------


def test_vectors_get_what_their_strategy_gives_them() -> None:
    assert choice(SOAP, 100) == ("none",)
    assert choice(SOAP, 100, precondition_1d=True) == ("dense",)
    assert choice(SOAP, 2000, precondition_1d=True) == ("none",)
    assert choice(Shampoo, 100) == ("dense",)
    assert choice(Shampoo, 2000) == ("none",)
    # and so follow AdamW
    assert choice(KLShampoo, 2000, precondition_1d=True) == ("none",)


def test_vectors_of_sirf_are_diagonal_at_any_length() -> None:
    for length in (1, 100, 2000, 50_000):
        assert choice(SIRFShampoo, length) == ("diagonal",)
    # a vector in all but shape, as the norms of torch's weight_norm are
    assert choice(SIRFShampoo, 600, 1) == ("diagonal",)
    assert choice(SIRFShampoo, 100, structures="dense") == ("dense",)
    assert choice(SIRFShampoo, 100, structures={1: "none"}) == ("none",)


def test_merged_axes_count_as_one() -> None:
    assert choice(SOAP, 32, 4, 10, 10) == ("dense",) * 4
    rules = (MergeDims(2000),)
    assert choice(SOAP, 32, 4, 10, 10, combine_params=rules) == ("none", "dense")  # 1280x10
    assert choice(SOAP, 40, 50, combine_params=rules) == ("none",)  # 2000


# --- max_precond_dim of SIRF-Shampoo -------------------------------------------------------------


def test_sirf_leaves_out_dense_factors_of_axes_beyond_its_limit() -> None:
    assert choice(SIRFShampoo, 700, 300) == ("dense", "dense")
    assert choice(SIRFShampoo, 700, 300, max_precond_dim=699) == ("none", "dense")
    assert choice(SIRFShampoo, 700, 300, max_precond_dim=700) == ("dense", "dense")
    named: Any = {"structures": "dense", "max_precond_dim": 500}
    assert choice(SIRFShampoo, 700, 300, **named) == ("none", "dense")
    cheap: Any = {"structures": "diagonal", "max_precond_dim": 500}
    assert choice(SIRFShampoo, 700, 300, **cheap) == ("diagonal", "diagonal")
    # by default as for the others
    assert choice(SIRFShampoo, 10_001, 5000) == ("none", "dense")
    optimizer = SIRFShampoo(params((2, 3)), max_precond_dim=7)
    assert optimizer.param_groups[0]["strategy"] == SIRFShampooStrategy(max_precond_dim=7)


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), "10"])
def test_the_limit_is_checked(wrong: Any) -> None:
    with pytest.raises(HyperparameterError, match="max_precond_dim must be"):
        SIRFShampoo(params((2, 3)), max_precond_dim=wrong)


# --- what is said about it -----------------------------------------------------------------------


def test_describe_says_where_a_factor_was_left_out() -> None:
    model = nn.Sequential(nn.Linear(9216, 128), nn.Linear(128, 3000), nn.Linear(3000, 3))
    optimizer = SOAP(model)
    rows = {row.names[0]: row.left_out for row in describe(optimizer).rows}
    assert rows == {
        "0.weight": (1,),
        "0.bias": (),
        "1.weight": (0,),
        "1.bias": (),  # SOAP has no factors for vectors of any length
        "2.weight": (1,),
        "2.bias": (),
    }
    assert str(describe(optimizer)).splitlines()[-1] == (
        "No factor for long axes: axis 1 of 0.weight (128x9216), axis 0 of 1.weight (3000x128), "
        "axis 1 of 2.weight (3x3000)"
    )


def test_describe_says_so_of_max_precond_dim_but_not_of_the_users_choice() -> None:
    model = nn.Linear(30, 20, bias=False)
    limited = describe(SOAP(model, max_precond_dim=25, structures="dense"))
    assert [row.left_out for row in limited.rows] == [(1,)]
    named = describe(SOAP(model, structures={2: ("dense", "none")}))
    assert [row.left_out for row in named.rows] == [()]
    assert "No factor" not in str(named)
    assert "No factor" not in str(describe(AdamW(nn.Linear(9216, 2))))
    long = describe(Shampoo(params((2000,))))
    assert [row.left_out for row in long.rows] == [(0,)]


def test_unknown_names_list_auto_too() -> None:
    with pytest.raises(StructureError, match=r"Unknown structure 'Auto'. Use one of auto, dense"):
        SOAP(params((2, 3)), structures="Auto")


# --- checkpoints ---------------------------------------------------------------------------------


def trained(shape: tuple[int, ...], **given: Any) -> tuple[nn.Parameter, SOAP]:
    p = nn.Parameter(torch.ones(shape))
    optimizer = SOAP([p], lr=0.1, precondition_frequency=2, **given)
    for step in range(3):
        set_grads([p], step)
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        ("dense", "auto"),
        ("auto", "dense"),
        ({2: ("dense", "none")}, {2: ("auto", "none")}),
        ({2: ("auto", "none")}, {2: ("dense", "none")}),
    ],
)
def test_checkpoints_load_where_auto_and_dense_are_the_same(saving: Any, loading: Any) -> None:
    p, optimizer = trained((4, 3), structures=saving)
    q, fresh = trained((4, 3), structures=loading)
    with torch.no_grad():
        q.copy_(p)
    fresh.load_state_dict(optimizer.state_dict())
    for step in range(3, 6):
        for param, own in ((p, optimizer), (q, fresh)):
            set_grads([param], step)
            own.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize(("saving", "loading"), [("dense", "auto"), ("auto", "dense")])
def test_checkpoints_are_refused_where_they_differ(saving: str, loading: str) -> None:
    saved = trained((2, 1100), structures=saving)[1].state_dict()
    _, optimizer = trained((2, 1100), structures=loading)
    before = optimizer.state_dict()
    with pytest.raises(CheckpointError) as caught:
        optimizer.load_state_dict(saved)
    assert f"build the optimizer with structures='{saving}'" in str(caught.value)
    assert "factors.1.mat" in str(caught.value)
    assert same_bits(optimizer.state_dict(), before)


def test_other_misfits_are_not_blamed_on_structures() -> None:
    saved = trained((4, 3), structures="dense")[1].state_dict()
    _, optimizer = trained((4, 3), structures="auto")
    other = trained((4, 3), structures="auto")[1].state_dict()
    other["state"][0]["exp_avg"] = other["state"][0]["exp_avg"][:2]
    with pytest.raises(CheckpointError) as caught:
        optimizer.load_state_dict(other)
    assert "structures" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"structures is \"?.*diagonal"):
        trained((4, 3), structures={2: ("auto", "diagonal")})[1].load_state_dict(saved)
