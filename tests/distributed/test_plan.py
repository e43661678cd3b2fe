"""A plan tells what real ranks keep, send and call, without them and without memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from structprecond import (
    SOAP,
    AdamW,
    KLShampoo,
    Muon,
    PerParameter,
    SIRFShampoo,
    SplitHeads,
    StructuredOptimizer,
)
from structprecond.core import agreement
from structprecond.errors import StructPrecondError
from structprecond.plan import Forecast, plan
from structprecond.plan.__main__ import main
from structprecond.plan.mesh import MeshSpec
from tests.distributed import layouts, pool
from tests.helpers import Allocations


def uneven() -> nn.Module:
    """Return layers whose rows 2 ranks cannot divide evenly, and a vector of one number."""
    layers = [nn.Linear(7, 9), nn.Linear(9, 16, bias=False), nn.Linear(16, 1)]
    return nn.Sequential(*layers)


def low_precision() -> nn.Module:
    return uneven().bfloat16()


@dataclass(frozen=True)
class Case:
    """A model and its optimizer."""

    build: Callable[[], nn.Module]
    optimizer: Callable[..., StructuredOptimizer]


CASES = {
    "factors": Case(uneven, partial(SOAP, lr=0.01, precondition_frequency=1)),
    "two strategies": Case(layouts.mlp, Muon),
    "rows": Case(
        layouts.mlp, partial(KLShampoo, combine_params=(SplitHeads("2.weight", 4), PerParameter()))
    ),
    "rounding errors": Case(low_precision, partial(SOAP, rounding="kahan")),
    "a second decision": Case(uneven, partial(SIRFShampoo, batch_size=4, nonfinite="raise")),
}

Measured = tuple[int, list[tuple[int, int]], int]
"""The bytes of the state, those that each all-to-all sends and receives, and the collectives."""


def measure(rank: int, layout: str, case: str) -> Measured:
    """Measure a step of a real optimizer."""
    made = CASES[case]
    model = layouts.LAYOUTS[layout](made.build())
    mesh: Any = dist.group.WORLD if layout == "replicated" else None
    optimizer = made.optimizer(model, mesh=mesh)
    sent: list[tuple[int, int]] = []
    calls = 0
    send, gather = dist.all_to_all_single, agreement._all_gather

    def note_sent(out: Tensor, given: Tensor, *args: Any, **keywords: Any) -> Any:
        sent.append((given.nbytes, out.nbytes))
        return send(out, given, *args, **keywords)

    def note_gathered(*args: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        return gather(*args, **keywords)

    for step in range(2):  # the first step may do more
        layouts.set_grads(model, step)
        sent.clear()
        calls = 0
        with (
            mock.patch.object(dist, "all_to_all_single", note_sent),
            mock.patch.object(agreement, "_all_gather", note_gathered),
        ):
            optimizer.step()
    state = {id(t): t for b in optimizer.buckets for t in b.named_tensors().values()}
    return sum(t.numel() * t.element_size() for t in state.values()), sent, calls + len(sent)


def compare(forecast: Forecast, number: int, measured: Measured, collects: bool) -> None:
    """Compare the plan of a rank with what was measured there."""
    state, sent, collectives = measured
    cost = forecast.ranks[number]
    assert cost.state_bytes == state
    assert forecast.collectives == collectives
    # all exchanges collect before any spreads
    half = len(sent) // 2 if collects else 0
    inward = [sum(numbers) for numbers in zip(*sent[:half], strict=True)] or [0, 0]
    outward = [sum(numbers) for numbers in zip(*sent[half:], strict=True)]
    assert [cost.collect_sent, cost.collect_received] == inward
    assert [cost.spread_sent, cost.spread_received] == outward


@pytest.mark.parametrize("case", CASES)
def test_plans_are_what_two_ranks_of_fsdp_do(case: str) -> None:
    forecast = plan(CASES[case].build, CASES[case].optimizer, world=2, mesh="fsdp")
    for rank, measured in enumerate(pool.run(2, measure, "fsdp", case)):
        compare(forecast, rank, measured, collects=True)


@pytest.mark.parametrize("case", ["factors", "two strategies"])
def test_plans_are_what_two_ranks_with_whole_parameters_do(case: str) -> None:
    forecast = plan(CASES[case].build, CASES[case].optimizer, world=2, mesh="ddp")
    for rank, measured in enumerate(pool.run(2, measure, "replicated", case)):
        compare(forecast, rank, measured, collects=False)


def test_plans_of_shard_groups_are_what_each_group_does() -> None:
    case = CASES["two strategies"]
    forecast = plan(case.build, case.optimizer, world=4, mesh="replicate=2,shard=2")
    assert forecast == plan(case.build, case.optimizer, world=4, mesh="hsdp:2x2")
    for rank, measured in enumerate(pool.run(4, measure, "hsdp", "two strategies")):
        compare(forecast, rank % 2, measured, collects=True)


# --- sizes ---------------------------------------------------------------------------------------


def matrices_of_7b(layers: int = 32, width: int = 4096, inner: int = 11008) -> nn.Module:
    """Return the hidden matrices of a language model with 7 billion parameters."""
    shapes = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]
    made = [nn.Linear(n, m, bias=False) for _ in range(layers) for m, n in shapes]
    return nn.Sequential(*made)


def dense_soap(model: nn.Module, mesh: Any) -> StructuredOptimizer:
    return SOAP(model, structures="dense", max_precond_dim=20000, mesh=mesh)


# largest state over ideal: 366e6 numbers, the state of an 11008 x 4096 matrix, over 48e9 / ranks
@pytest.mark.filterwarnings("ignore:Some Kronecker factors")
@pytest.mark.parametrize(("world", "ratio"), [(64, 1.02), (128, 1.07), (256, 1.95), (1024, 7.8)])
def test_units_of_7b_run_out(world: int, ratio: float) -> None:
    forecast = plan(matrices_of_7b, dense_soap, world=world)
    assert len(forecast.units) == 224
    assert forecast.ratio("state_bytes") == pytest.approx(ratio, abs=0.01 if world < 1024 else 0.05)
    assert forecast.parameter_bytes == 4 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert bool(forecast.advice) == (ratio > 1.5)


@pytest.mark.filterwarnings("ignore:Some Kronecker factors")
def test_a_thousand_ranks_take_no_memory() -> None:
    with Allocations() as seen:
        forecast = plan(partial(matrices_of_7b, layers=2), dense_soap, world=1024)
    assert forecast.state_bytes > 10 * 2**30
    assert seen.largest < 2**20


# --- operations ----------------------------------------------------------------------------------


def squares(count: int = 8) -> nn.Module:
    return nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(count))


@pytest.mark.parametrize(("refresh", "refreshed"), [("synchronous", 8), ("staggered", 2)])
def test_the_slowest_step_has_all_refreshes_or_those_of_a_turn(
    refresh: Any, refreshed: int
) -> None:
    optimizer = partial(SOAP, precondition_frequency=4, refresh=refresh)
    (cost,) = plan(squares, optimizer, world=1).ranks
    each = cost.refresh_operations // 8
    assert each > 0
    assert cost.slowest_operations == cost.step_operations + refreshed * each


def test_operations_are_those_of_all_rows() -> None:
    def soap(m: int, n: int) -> int:
        # 20 for each number; both axes of the gradient are rotated, both axes of the update are
        # rotated back, and both factors get a product: 2 for each number and row of the factor
        return 20 * m * n + 3 * (2 * m * n * m + 2 * m * n * n)

    (alone,) = plan(partial(squares, 1), SOAP, world=1).ranks
    split = partial(SOAP, combine_params=(SplitHeads("0.weight", 4), PerParameter()))
    (of_rows,) = plan(partial(squares, 1), split, world=1).ranks
    assert (alone.owned, of_rows.owned) == (1, 4)
    assert (alone.step_operations, of_rows.step_operations) == (soap(16, 16), 4 * soap(4, 16))


# --- advice --------------------------------------------------------------------------------------


def test_advice_names_the_group_size_and_the_largest_unit() -> None:
    assert plan(squares, SOAP, world=8).advice == ()
    advice = " ".join(plan(squares, SOAP, world=32).advice)
    assert "4.0 times the ideal: 8 units and rows" in advice
    assert "The largest is 0.weight (16x16, " in advice
    assert "--mesh replicate=4,shard=8" in advice
    assert "planned by --world 8" in " ".join(plan(squares, SOAP, world=32, mesh="ddp").advice)


def embedding_and_layer() -> nn.Module:
    return nn.Sequential(nn.Embedding(36, 16), nn.Linear(16, 16, bias=False))


def test_advice_for_units_of_factors_or_of_moments_works() -> None:
    # 576 of 832 numbers are 2.8 times the ideal of 4 ranks
    advice = " ".join(plan(embedding_and_layer, AdamW, world=4).advice)
    assert "Most of its state is moments. SplitHeads('0.weight', heads=3) in" in advice
    groupings = (SplitHeads("0.weight", heads=3), PerParameter())
    assert plan(embedding_and_layer, partial(AdamW, combine_params=groupings), world=4).advice == ()
    dense = partial(SOAP, structures="dense")
    advice = " ".join(plan(partial(squares, 1), dense, world=4).advice)
    assert 'such as structures={2: "block1024diagonal"}' in advice


# --- the command ---------------------------------------------------------------------------------


def frozen() -> nn.Module:
    return squares().requires_grad_(False)


def scalar() -> nn.Module:
    return nn.ParameterDict({"scale": nn.Parameter(torch.ones(()))})


def a_number() -> int:
    return 3


def forgetful(model: nn.Module, mesh: Any) -> StructuredOptimizer:
    return SOAP(model)


def foreign(model: nn.Module, mesh: Any) -> Any:
    return torch.optim.SGD(model.parameters())


HERE = __name__


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    given = f"{HERE}:squares --world 4 --mesh hsdp:2x2 --optimizer SOAP --by-rank"
    assert main([*given.split(), "--set", "lr=0.1", "--set", "structures=diagonal"]) == 0
    printed = capsys.readouterr().out
    expected = plan(squares, partial(SOAP, structures="diagonal"), world=4, mesh="hsdp:2x2")
    assert printed == f"{expected}\n\n{expected.by_rank()}\n"
    assert "2 ranks own 8 units in each of 2 groups" in printed
    assert len(expected.by_rank().splitlines()) == 2 + 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("squares", "'squares' names no callable. Write it as package.module:name"),
        ("no_such_package:build", "There is no module to import for no_such_package:build"),
        (f"{HERE}:missing", "Name a function of that module"),
        (f"{HERE}:HERE", "expected a callable"),
        (f"{HERE}:a_number", "build returned 3, expected the model"),
        (f"{HERE}:frozen", "let some parameters require gradients"),
        (f"{HERE}:scalar", "fully_shard cannot shard scale, which has no axes"),
        (f"{HERE}:squares --world 0", "world is a number of ranks of at least 1, got 0"),
        (f"{HERE}:squares --mesh tp", "mesh takes"),
        (f"{HERE}:squares --mesh shard=2,shard=2", "mesh takes"),
        (f"{HERE}:squares --mesh hsdp:3x2", "2 x 3 = 6 ranks, but world is 4. Give a world of 6"),
        (f"{HERE}:squares --optimizer Soap", "There is no optimizer 'Soap'. Known are AdamW, "),
        (f"{HERE}:squares --optimizer {HERE}:foreign", "expected an optimizer of this library"),
        (f"{HERE}:squares --optimizer {HERE}:forgetful --mesh ddp", "pass the model and mesh="),
        (f"{HERE}:squares --set lr", "--set takes name=value, such as lr=0.01, got 'lr'"),
        (f"{HERE}:squares --set lr=-1", "lr must be"),
    ],
)
def test_bad_arguments_say_what_to_do(
    given: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--world", "4", *given.split()])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not dist.is_initialized()


def plan_inside(rank: int) -> str:
    with pytest.raises(StructPrecondError) as raised:
        plan(squares, SOAP, world=2)
    return str(raised.value)


def test_real_ranks_are_told_to_plan_elsewhere() -> None:
    for message in pool.run(2, plan_inside):
        assert "is one of 2 ranks. Make the plan in a process of its own" in message


def test_shared_parameters_stay_shared() -> None:
    def tied() -> nn.Module:
        model = nn.ModuleList([nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)])
        model[1].weight = model[0].weight
        return model

    assert plan(tied, SOAP, world=2).parameter_bytes == 4 * prod((32, 16))


def test_importing_the_library_imports_no_plan() -> None:
    code = "import sys, structprecond; print([m for m in sys.modules if '.plan' in m])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_meshes_are_read() -> None:
    assert MeshSpec.parse("shard=2,replicate=3", 6) == MeshSpec(("shard", "replicate"), (2, 3))
