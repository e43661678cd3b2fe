"""A structured optimizer behaves as torch's optimizers do, whatever is stacked inside."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Size, Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from structprecond import (
    FlattenEmbedding,
    GradientError,
    Hyperparameter,
    LinearWeightBias,
    PerParameter,
    PreconditionerGroup,
    SIRFShampoo,
    SIRFShampooStrategy,
    SplitHeads,
    State,
    StepContext,
    Strategy,
    StructPrecondError,
    StructuredOptimizer,
)
from tests.helpers import (
    SETTINGS,
    DenseUnit,
    assert_close,
    backward,
    data,
    dense_units,
    linear_unit,
    mlp,
    same_bits,
    set_grads,
    snapshot,
    train,
    values,
)

# --- learning rates and schedulers ---------------------------------------------------------------


def _two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Deal the parameters out in an order that is neither that of the model nor by shape."""
    params = list(model.parameters())
    return [
        {"params": [params[4], params[1], params[0]], "lr": 0.1},
        {"params": [params[7], params[2], params[6], params[3], params[5]], "lr": 0.02},
    ]


def test_param_groups_stay_as_given_and_each_follows_its_scheduler() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    groups, twin_groups = _two_groups(model), _two_groups(twin)
    optimizer = SIRFShampoo(model, groups, **SETTINGS)
    schedules = [lambda e: 0.5**e, lambda e: 1 / (1 + e)]
    scheduler = LambdaLR(optimizer, schedules)
    dense = [[DenseUnit([p]) for p in group["params"]] for group in twin_groups]
    for step in range(6):
        lrs = [base * schedule(step) for base, schedule in zip((0.1, 0.02), schedules, strict=True)]
        assert [group["lr"] for group in optimizer.param_groups] == lrs
        assert scheduler.get_last_lr() == lrs
        train(model, optimizer, 1, start=step)
        scheduler.step()
        twin.zero_grad()
        backward(twin, step)
        for units, lr in zip(dense, lrs, strict=True):
            for unit in units:
                unit.step(6, lr=lr)
        assert_close(values(model), values(twin))
    assert optimizer.global_step == 6
    for mine, given in zip(optimizer.param_groups, groups, strict=True):
        assert [id(p) for p in mine["params"]] == [id(p) for p in given["params"]]
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]


def test_one_cycle_drives_the_learning_rate_that_is_used() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    one_cycle: dict[str, Any] = {"max_lr": 0.2, "total_steps": 8, "cycle_momentum": False}
    optimizer, sgd = SIRFShampoo(model, **SETTINGS), torch.optim.SGD(mlp().parameters(), lr=0.05)
    scheduler, reference = OneCycleLR(optimizer, **one_cycle), OneCycleLR(sgd, **one_cycle)
    dense = dense_units(twin)
    for step in range(8):
        train(model, optimizer, 1, start=step)
        twin.zero_grad()
        backward(twin, step)
        for unit in dense:
            unit.step(6, lr=sgd.param_groups[0]["lr"])
        sgd.step()
        if step < 7:
            scheduler.step()
            reference.step()
    assert_close(values(model), values(twin))


def test_warm_up_from_zero_updates_state_but_not_parameters() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, **SETTINGS)
    scheduler = LambdaLR(optimizer, lambda e: min(e / 3, 1.0))
    dense = dense_units(twin)
    before = values(model)
    for step in range(6):
        train(model, optimizer, 1, start=step)
        scheduler.step()
        twin.zero_grad()
        backward(twin, step)
        for unit in dense:
            unit.step(6, lr=0.05 * min(step / 3, 1.0))
        if step == 0:
            assert same_bits(values(model), before)
        for p, unit in zip(model.parameters(), dense, strict=True):
            entry = optimizer.state[p]
            assert_close(entry["momentum_buffer"], unit.problems[0].buf)
            for k, K in enumerate(unit.problems[0].K):
                assert_close(entry[f"preconditioner.{k}.mat"], K)
                assert_close(entry[f"preconditioner_momenta.{k}.mat"], unit.problems[0].m[k])
    assert_close(values(model), values(twin))


def test_tensor_learning_rate_equals_float_and_is_scheduled_in_place() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    lr = torch.tensor(0.05, dtype=torch.float64)
    optimizer = SIRFShampoo(model, **SETTINGS | {"lr": lr})
    reference = SIRFShampoo(twin, **SETTINGS)
    schedulers = [LambdaLR(o, lambda e: 0.7**e) for o in (optimizer, reference)]
    for step in range(5):
        for m, o in ((model, optimizer), (twin, reference)):
            train(m, o, 1, start=step)
        for scheduler in schedulers:
            scheduler.step()
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.05 * 0.7**5)
    assert_close(values(model), values(twin), 1e-13)


def test_hyperparameters_are_read_from_the_live_group_at_every_step() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, **SETTINGS)
    dense = dense_units(twin)
    for step, (key, value) in enumerate([*SETTINGS.items(), ("lr", 0.01)]):
        optimizer.param_groups[0][key] = 0.6 * value
        train(model, optimizer, 1, start=step)
        twin.zero_grad()
        backward(twin, step)
        live = {k: optimizer.param_groups[0][k] for k in SETTINGS}
        for unit in dense:
            unit.step(6, **live)
    assert_close(values(model), values(twin))


@pytest.mark.parametrize("give", ["model", "generator", "named", "groups", "named groups", "alone"])
def test_every_way_of_giving_the_parameters_trains_alike(give: str) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    params: Any = {
        "model": None,
        "generator": model.parameters(),
        "named": model.named_parameters(),
        "groups": [{"params": model[:4].parameters()}, {"params": list(model[4:].parameters())}],
        "named groups": [{"params": model.named_parameters()}],
    }.get(give)
    if give == "alone":
        optimizer = SIRFShampoo(model.parameters(), batch_size=6, **SETTINGS)
    else:
        optimizer = SIRFShampoo(model, params, **SETTINGS)
    dense = dense_units(twin)
    train(model, optimizer, 3)
    _train_dense(twin, dense, 3)
    assert_close(values(model), values(twin))


def _train_dense(model: nn.Module, dense: list[DenseUnit], steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        model.zero_grad()
        backward(model, step)
        for unit in dense:
            unit.step(6)


# --- closures, scalers, accumulation -------------------------------------------------------------


def test_closure_runs_once_with_gradients_enabled_and_its_loss_comes_back() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, reference = (SIRFShampoo(m, **SETTINGS) for m in (model, twin))
    losses: list[Tensor] = []

    def closure() -> Any:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        losses.append(backward(model, 0))
        return losses[-1]

    with torch.no_grad():
        returned: Any = optimizer.step(closure)
    assert len(losses) == 1
    assert returned is losses[0]
    assert optimizer.batch_size == 6
    train(twin, reference, 1)
    assert same_bits(values(model), values(twin))


def test_closure_that_raises_leaves_everything_unchanged() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, **SETTINGS)
    train(model, optimizer, 1)
    before = snapshot(model, optimizer)

    def closure() -> float:
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        optimizer.step(closure)
    assert same_bits(snapshot(model, optimizer), before)


@pytest.mark.parametrize("bad", [None, 2])
def test_grad_scaler_trains_as_without_and_skips_overflowing_steps(bad: int | None) -> None:
    model = mlp(torch.float32)
    twin = copy.deepcopy(model)
    optimizer, reference = (SIRFShampoo(m, **SETTINGS) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for step in range(5):
        before = snapshot(model, optimizer)
        optimizer.zero_grad()
        x, y = data(step, dtype=torch.float32)
        loss = (model(x) - y).square().sum(1).mean()
        scaler.scale(loss * torch.inf if step == bad else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == bad:
            after = snapshot(model, optimizer)
            assert all(same_bits(before[key], after[key]) for key in ("params", "stacks"))
            assert optimizer.global_step == step
        else:
            train(twin, reference, 1, start=step)
    assert scaler.get_scale() == (2.0**10 if bad is None else 2.0**9)
    assert optimizer.batch_size == 6
    assert_close(values(model), values(twin), 1e-6)


def test_accumulated_micro_batches_equal_one_big_batch() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, reference = (SIRFShampoo(m, **SETTINGS) for m in (model, twin))
    for step in range(4):
        optimizer.zero_grad()
        x, y = data(step)
        for part in (slice(0, 3), slice(3, 6)):
            loss = (model(x[part]) - y[part]).square().sum(1).mean() / 2
            loss.backward()
        optimizer.step()
        assert optimizer.batch_size == 6
        train(twin, reference, 1, start=step)
    assert_close(values(model), values(twin))


def test_two_optimizers_on_one_model_do_not_disturb_each_other() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    weights = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim == 1]
    first, second = (SIRFShampoo(model, part, **SETTINGS) for part in (weights, biases))
    dense = dense_units(twin)
    for step in range(3):
        model.zero_grad()
        backward(model, step)
        first.step()
        second.step()
        assert first.batch_size == second.batch_size == 6
    _train_dense(twin, dense, 3)
    assert_close(values(model), values(twin))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_gradients_as_torch_does(set_to_none: bool) -> None:
    model = mlp()
    optimizer = SIRFShampoo(model)
    backward(model, 0)
    optimizer.zero_grad(set_to_none)
    for p in model.parameters():
        assert p.grad is None if set_to_none else not (p.grad is None or p.grad.any())


def test_gradients_are_not_overwritten_by_the_step() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, maximize=True, **SETTINGS)
    backward(model, 0)
    params = list(model.parameters())
    grads = [p.grad for p in params]
    contents = copy.deepcopy(grads)
    pointers = [p.data_ptr() for p in params]
    optimizer.step()
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
    assert same_bits(grads, contents)
    assert [p.data_ptr() for p in params] == pointers


# --- param groups added later --------------------------------------------------------------------


def test_added_group_trains_like_one_given_at_the_start() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, model[:4].parameters(), **SETTINGS)
    optimizer.add_param_group({"params": model[4:].parameters(), "lr": 0.01, "alpha1": 0.5})
    assert optimizer.param_groups[1]["lam"] == SETTINGS["lam"]
    scheduler = LambdaLR(optimizer, [lambda e: 1.0, lambda e: 0.5**e])
    first, second = dense_units(twin[:4]), dense_units(twin[4:])
    for step in range(4):
        train(model, optimizer, 1, start=step)
        scheduler.step()
        twin.zero_grad()
        backward(twin, step)
        for unit in first:
            unit.step(6)
        for unit in second:
            unit.step(6, lr=0.01 * 0.5**step, alpha1=0.5)
    assert_close(values(model), values(twin))


def test_group_added_in_the_middle_starts_fresh_and_leaves_the_others_alone() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, model[:4].parameters(), **SETTINGS)
    first, second = dense_units(twin[:4]), dense_units(twin[4:])
    train(model, optimizer, 3)
    _train_dense(twin, first, 3)
    optimizer.add_param_group({"params": list(model[4:].parameters())})
    train(model, optimizer, 3, start=3)
    _train_dense(twin, first + second, 3, start=3)
    assert_close(values(model), values(twin))


def test_group_may_be_a_single_parameter() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, model[0].parameters(), batch_size=6)
    optimizer.add_param_group({"params": model[2].weight})
    before = values(model)
    train(model, optimizer, 1)
    moved = [not same_bits(a, b) for a, b in zip(before, values(model), strict=True)]
    assert moved == [True, True, True, False, False, False, False, False]


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ({"momentum": 0.9}, StructPrecondError, "momentum"),
        ({"alpha_1": 0.9}, StructPrecondError, "alpha_1"),
        ({"lr": -1.0}, StructPrecondError, "lr must be"),
        ({"structures": "dence"}, StructPrecondError, "dence"),
        ({"structures": {3: "dense"}}, StructPrecondError, r"4\.weight"),
        ({"combine_params": ()}, StructPrecondError, r"4\.weight"),
        ({"combine_params": (SplitHeads("4.weight", 3), PerParameter())}, StructPrecondError, "4"),
        ({"preconditioner_dtypes": torch.int64}, StructPrecondError, "int64"),
        ({"params": [nn.Parameter(torch.ones(5, 7))]}, StructPrecondError, r"\(5, 7\)"),
        ({"params": "known"}, ValueError, "more than one parameter group"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_group_that_is_refused_leaves_everything_unchanged(
    what: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, model[:4].parameters(), **SETTINGS)
    reference = SIRFShampoo(twin, twin[:4].parameters(), **SETTINGS)
    train(model, optimizer, 2)
    train(twin, reference, 2)
    before = snapshot(model, optimizer)
    if what.get("params") == "known":
        what = {"params": [model[4].bias, model[0].weight]}
    given = {"params": list(model[4:].parameters())} | what
    passed = dict(given)
    with pytest.raises(error, match=message):
        optimizer.add_param_group(passed)
    assert same_bits(snapshot(model, optimizer), before)
    assert same_bits(passed, given)
    assert len(optimizer.state_dict()["state"]) == 4
    train(model, optimizer, 2, start=2)
    train(twin, reference, 2, start=2)
    assert same_bits(snapshot(model, optimizer)["params"], snapshot(twin, reference)["params"])
    optimizer.add_param_group({"params": list(model[4:].parameters())})


def test_group_may_have_a_name() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, [{"params": model.parameters(), "name": "all"}])
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["name"] == "all"


# --- missing, late and frozen --------------------------------------------------------------------


def test_step_without_any_gradient_changes_nothing_as_in_torch() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, **SETTINGS)
    before = snapshot(model, optimizer)
    optimizer.step()
    after = snapshot(model, optimizer)
    assert all(same_bits(before[key], after[key]) for key in ("params", "stacks"))
    train(model, optimizer, 1)


@pytest.mark.parametrize("missing", [0, 2, 5])
def test_unit_without_gradient_stays_as_it_is_and_the_others_do_not_notice(missing: int) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, **SETTINGS)
    dense = dense_units(twin)
    params = list(model.parameters())
    for step in range(5):
        for m in (model, twin):
            m.zero_grad()
            backward(m, step)
        skip = step in (1, 3)
        before = {name: t.clone() for name, t in optimizer.state[params[missing]].items()}
        value = params[missing].detach().clone()
        if skip:
            params[missing].grad = None
        optimizer.step()
        for i, unit in enumerate(dense):
            if not (skip and i == missing):
                unit.step(6)
        if skip:
            after = dict(optimizer.state[params[missing]])
            for name in before.keys() - {"global_step", "batch_size"}:
                assert same_bits(after[name], before[name]), name
            assert same_bits(params[missing].detach(), value)
        assert_close(values(model), values(twin))


@pytest.mark.parametrize("lacking", ["weight", "bias"])
def test_joint_unit_waits_until_all_its_members_have_gradients(lacking: str) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    rules = (LinearWeightBias(),)
    optimizer = SIRFShampoo(model, combine_params=rules, batch_size=6, **SETTINGS)
    dense = [linear_unit(layer) for layer in twin if isinstance(layer, nn.Linear)]
    for step in range(4):
        for m in (model, twin):
            set_grads(list(m.parameters()), step)
        if step == 1:
            getattr(model[2], lacking).grad = None
        optimizer.step()
        for unit in dense:
            if not (step == 1 and unit.params[0] is twin[2].weight):
                unit.step(6)
    assert_close(values(model), values(twin))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_member_that_is_frozen_from_the_start_leaves_the_others_to_the_next_rule(
    frozen: str,
) -> None:
    model = mlp()
    getattr(model[2], frozen).requires_grad_(False)
    twin = copy.deepcopy(model)
    rules = (LinearWeightBias(), PerParameter())
    optimizer = SIRFShampoo(model, combine_params=rules, **SETTINGS)
    dense = [linear_unit(twin[i]) for i in (0, 4, 6)]
    dense += [DenseUnit([p]) for p in twin[2].parameters() if p.requires_grad]
    train(model, optimizer, 4)
    _train_dense(twin, dense, 4)
    assert_close(values(model), values(twin))


@pytest.mark.parametrize(
    ("T", "refreshes"),
    [
        (1, set(range(12))),
        (3, {5, 8, 11}),
        # missed the refreshes at 0, 2 and 4
        (lambda step: step in (0, 2, 4, 8), {5, 8}),
    ],
    ids=["every step", "every third step of its own", "callable"],
)
def test_unit_that_gets_gradients_late_behaves_as_a_fresh_optimizer_would(
    T: Any, refreshes: set[int]
) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, T=T, **SETTINGS)
    late, dense = model[4].weight, DenseUnit([twin[4].weight])
    fresh = SIRFShampoo(twin, [twin[2].weight], T=T, **SETTINGS)  # the same shape, never late
    for step in range(12):
        model.zero_grad()
        set_grads(list(model.parameters()), step)
        optimizer.batch_size = fresh.batch_size = 6
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        if step < 5:
            late.grad = None
        optimizer.step()
        fresh.step()
        if step >= 5:
            dense.step(6, refresh=step in refreshes)
        assert_close(late.detach(), twin[4].weight.detach())
        assert_close(model[2].weight.detach(), twin[2].weight.detach())
    assert optimizer.state[late]["step"].item() == 7


def test_frozen_parameters_wait_with_fresh_state_until_they_are_thawed() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    frozen = list(model[2].parameters())
    model[2].requires_grad_(False)
    optimizer = SIRFShampoo(model, **SETTINGS)
    dense, before = dense_units(twin), [p.detach().clone() for p in frozen]
    late, others = dense[2:4], dense[:2] + dense[4:]
    train(model, optimizer, 3)
    _train_dense(twin, others, 3)
    assert same_bits([p.detach() for p in frozen], before)
    model[2].requires_grad_(True)
    train(model, optimizer, 3, start=3)
    _train_dense(twin, others + late, 3, start=3)
    # frozen again, with the last gradient still in place
    optimizer.zero_grad()
    for m in (model, twin):
        m.zero_grad()
        backward(m, 6)
    model[2].requires_grad_(False)
    optimizer.step()
    for unit in others:
        unit.step(6)
    assert_close(values(model), values(twin))


# --- copies --------------------------------------------------------------------------------------


def _by_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def _by_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIERS = [copy.deepcopy, _by_pickle, _by_file]
STRUCTURES: list[Any] = ["dense", {1: "diagonal", 2: ("hierarchical1_1", "none")}]


@pytest.mark.parametrize("structures", STRUCTURES, ids=["dense", "mixed"])
@pytest.mark.parametrize("copier", COPIERS)
def test_copies_of_model_and_optimizer_go_on_alike_and_apart(
    copier: Callable[[Any], Any], structures: Any
) -> None:
    model = mlp()
    rules = (LinearWeightBias(), PerParameter())
    optimizer = SIRFShampoo(
        model, _two_groups(model), structures=structures, combine_params=rules, **SETTINGS
    )
    train(model, optimizer, 4)
    model_copy, clone = copier((model, optimizer))
    assert clone.model is model_copy
    mine = {id(p) for p in model_copy.parameters()}
    assert {id(p) for group in clone.param_groups for p in group["params"]} == mine
    assert {id(p) for p in clone.state} <= mine
    before = snapshot(model, optimizer)
    for part in ("params", "shown", "stacks", "counters"):
        assert same_bits(snapshot(model_copy, clone)[part], before[part])
    train(model_copy, clone, 6, start=4)
    assert same_bits(snapshot(model, optimizer), before)
    train(model, optimizer, 6, start=4)
    assert same_bits(snapshot(model_copy, clone)["params"], snapshot(model, optimizer)["params"])
    assert same_bits(snapshot(model_copy, clone)["stacks"], snapshot(model, optimizer)["stacks"])
    # the groups of the copy are live, and its own
    clone.param_groups[0]["lr"] = clone.param_groups[1]["lr"] = 0.0
    frozen = values(model_copy)
    train(model_copy, clone, 1)
    assert same_bits(values(model_copy), frozen)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("copier", COPIERS)
def test_copy_of_the_optimizer_alone_goes_on_alike(
    copier: Callable[[Any], Any], with_model: bool
) -> None:
    model = mlp()
    first: Any = model if with_model else model.parameters()
    optimizer = SIRFShampoo(first, batch_size=6, **SETTINGS)
    train(model, optimizer, 3)
    clone = copier(optimizer)
    before = snapshot(model, optimizer)
    for step in range(5):
        set_grads(clone.param_groups[0]["params"], step)
        clone.step()
    assert same_bits(snapshot(model, optimizer), before)
    for step in range(5):
        set_grads(optimizer.param_groups[0]["params"], step)
        optimizer.step()
    mine, theirs = ([p.detach() for p in o.param_groups[0]["params"]] for o in (optimizer, clone))
    assert same_bits(mine, theirs)


@pytest.mark.parametrize("copier", COPIERS)
def test_copy_made_under_a_scheduler_steps_itself(copier: Callable[[Any], Any]) -> None:
    # schedulers replace optimizer.step by a function that is bound to the original
    model = mlp()
    optimizer = SIRFShampoo(model, **SETTINGS)
    LambdaLR(optimizer, lambda e: 0.9**e)
    train(model, optimizer, 2)
    model_copy, clone = copier((model, optimizer))
    before = snapshot(model, optimizer)
    train(model_copy, clone, 3, start=2)
    assert same_bits(snapshot(model, optimizer), before)
    train(model, optimizer, 3, start=2)
    assert same_bits(values(model), values(model_copy))


@pytest.mark.parametrize("copier", COPIERS)
def test_model_that_holds_its_optimizer_can_be_copied(copier: Callable[[Any], Any]) -> None:
    # in such a cycle, the optimizer is restored before the model is complete
    model = mlp()
    optimizer = SIRFShampoo(model, **SETTINGS)
    model.optimizer = optimizer
    train(model, optimizer, 2)
    model_copy = copier(model)
    clone: Any = model_copy.optimizer
    assert clone.model is model_copy
    train(model_copy, clone, 2, start=2)
    assert clone.batch_size == 6
    train(model, optimizer, 2, start=2)
    assert same_bits(values(model), values(model_copy))


def test_callables_among_the_hyperparameters_survive_a_deepcopy() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, T=lambda step: step % 3 == 0, **SETTINGS)
    train(model, optimizer, 2)
    model_copy, clone = copy.deepcopy((model, optimizer))
    train(model, optimizer, 4, start=2)
    train(model_copy, clone, 4, start=2)
    assert same_bits(values(model), values(model_copy))


# --- shapes and dtypes ---------------------------------------------------------------------------


class Odd(nn.Module):
    """Parameters of unusual sizes."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"scalar": (), "one": (1,), "row": (1, 4), "column": (5, 1), "dot": (1, 1, 1)}
        for name, shape in {**shapes, "empty": (0, 3), "cube": (2, 3, 1, 2)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape).double()))


def test_scalars_empty_and_size_one_parameters_train() -> None:
    model: Any = Odd()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, batch_size=3, **SETTINGS)
    dense = [DenseUnit([p]) for p in twin.parameters() if p.numel()]
    for step in range(4):
        set_grads(list(model.parameters()), step)
        set_grads(list(twin.parameters()), step)
        optimizer.step()
        for unit in dense:
            unit.step(3)
    assert_close(values(model), values(twin))
    assert optimizer.state[model.scalar]["preconditioner.0.mat"].shape == (1, 1)
    assert "preconditioner.1.mat" not in optimizer.state[model.row]
    assert not optimizer.state.get(model.empty)
    fresh = SIRFShampoo(Odd(), batch_size=3)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.global_step == 4


def test_unit_with_an_empty_member_trains() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # initializing nothing
        model = nn.Linear(0, 3).double()
    optimizer = SIRFShampoo(model, combine_params=(LinearWeightBias(),), batch_size=6, **SETTINGS)
    twin = copy.deepcopy(model)
    dense = DenseUnit([twin.bias])
    for m in (model, twin):
        m(torch.zeros(6, 0, dtype=torch.float64)).square().sum(1).mean().backward()
    optimizer.step()
    dense.step(6)
    assert_close(values(model), values(twin))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_get_the_rounded_update_of_float32_factors(
    dtype: torch.dtype,
) -> None:
    model = mlp(dtype)
    wide = mlp(torch.float32)
    optimizer, reference = (SIRFShampoo(m, batch_size=6, **SETTINGS) for m in (model, wide))
    for step in range(8):
        set_grads(list(model.parameters()), step)
        with torch.no_grad():
            for p, q in zip(model.parameters(), wide.parameters(), strict=True):
                assert p.grad is not None
                q.copy_(p)
                q.grad = p.grad.float()
        optimizer.step()
        reference.step()
        assert all(p.dtype == dtype for p in model.parameters())
        assert same_bits(values(model), [p.to(dtype) for p in values(wide)])
    for entry in optimizer.state.values():
        floating = [t.dtype for t in entry.values() if t.is_floating_point()]
        assert set(floating) == {torch.float32}


def test_parameters_of_several_dtypes_train_as_one_at_a_time() -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    layers = [nn.Linear(4, 4, dtype=dtype) for dtype in dtypes for _ in range(2)]
    model = nn.ModuleList(layers)
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, batch_size=6, **SETTINGS)
    singles = [SIRFShampoo([p], batch_size=6, **SETTINGS) for p in twin.parameters()]
    for step in range(4):
        for m in (model, twin):
            set_grads(list(m.parameters()), step)
        for o in (optimizer, *singles):
            o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.dtype == q.dtype
        assert_close(p.detach(), q.detach(), {8: 1e-12, 4: 1e-6, 2: 1e-2}[p.element_size()])


def test_float64_parameters_have_float64_state() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model)
    for entry in optimizer.state.values():
        assert {t.dtype for t in entry.values() if t.is_floating_point()} == {torch.float64}


def test_factors_are_stored_in_the_dtypes_asked_for() -> None:
    model = mlp()
    exact = copy.deepcopy(model)
    given: Any = {1: torch.float32, 2: (torch.bfloat16, None)}
    optimizer = SIRFShampoo(model, preconditioner_dtypes=given, **SETTINGS)
    train(model, optimizer, 5)
    entry = optimizer.state[model[2].weight]
    assert entry["preconditioner.0.mat"].dtype == torch.bfloat16
    assert entry["preconditioner_momenta.0.mat"].dtype == torch.bfloat16
    assert entry["preconditioner.1.mat"].dtype == torch.float64
    assert entry["momentum_buffer"].dtype == torch.float64
    assert optimizer.state[model[2].bias]["preconditioner.0.mat"].dtype == torch.float32
    _train_dense(exact, dense_units(exact), 5)
    assert_close(values(model), values(exact), 2**-7)


def test_model_converted_to_another_dtype_goes_on_with_its_state() -> None:
    model = mlp(torch.float32)
    twin = copy.deepcopy(model).double()
    optimizer = SIRFShampoo(model, **SETTINGS)
    train(model, optimizer, 3)
    model.double()
    train(model, optimizer, 3, start=3)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    _train_dense(twin, dense_units(twin), 6)
    assert_close(values(model), values(twin), 1e-4)


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.hidden = nn.Linear(3, 3)
        self.head = nn.Linear(3, 7)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.hidden(self.embedding(x))))
        return logits


def _backward_tied(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randint(7, (2, 6), generator=generator)
    nn.functional.cross_entropy(model(x), y).backward()


@pytest.mark.parametrize(
    "rules",
    [
        (PerParameter(),),
        (LinearWeightBias(), PerParameter()),
        (FlattenEmbedding(), LinearWeightBias(), PerParameter()),
    ],
    ids=["alone", "with the bias of the head", "as embedding"],
)
def test_tied_parameters_belong_to_one_unit(rules: tuple[PreconditionerGroup, ...]) -> None:
    model = Tied()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, combine_params=rules, **SETTINGS)
    weight, hidden, head = twin.embedding.weight, twin.hidden, twin.head
    flat = DenseUnit([weight], lambda ts: [ts[0].flatten()], lambda ps: [ps[0].view(7, 3)])
    dense: list[DenseUnit] = {
        1: [DenseUnit([p]) for p in twin.parameters()],
        2: [linear_unit(head), linear_unit(hidden)],
        3: [flat, DenseUnit([head.bias]), linear_unit(hidden)],
    }[len(rules)]
    assert sum("step" in entry for entry in optimizer.state.values()) == len(dense)
    for step in range(4):
        for m in (model, twin):
            m.zero_grad()
            _backward_tied(m, step)
        optimizer.step()
        for unit in dense:
            unit.step(6)
    assert_close(values(model), values(twin))
    model_copy, clone = copy.deepcopy((model, optimizer))
    _backward_tied(model_copy, 9)
    clone.step()
    assert model_copy.head.weight is model_copy.embedding.weight


def test_maximizing_is_minimizing_the_negative_with_the_same_decay() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, maximize=True, **SETTINGS)
    train(model, optimizer, 4)
    dense = dense_units(twin)
    for step in range(4):
        twin.zero_grad()
        backward(twin, step)
        for p in twin.parameters():
            assert p.grad is not None
            p.grad.neg_()
        for unit in dense:
            unit.step(6)
    assert_close(values(model), values(twin))


# --- what optimizer.state shows ------------------------------------------------------------------


def test_state_shows_one_unit_per_entry_under_stable_names_from_the_start() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4)).double()
    given: Any = {2: ("dense", "hierarchical1_1")}
    rules = (LinearWeightBias(),)
    optimizer = SIRFShampoo(model, combine_params=rules, structures=given)
    owners = [p for p, entry in optimizer.state.items() if "step" in entry]
    assert [id(p) for p in owners] == [id(model[0].weight), id(model[1].weight)]
    # torch's tools expect every parameter to have some state
    assert set(optimizer.state[model[1].bias]) == {"global_step", "batch_size"}
    shapes = {name: tuple(t.shape) for name, t in optimizer.state[model[1].weight].items()}
    matrices = {
        "0.mat": (4, 4), "1.a": (1, 1), "1.b": (1, 3), "1.c": (2,), "1.d": (1, 2), "1.e": (1, 1)
    }  # fmt: skip
    kinds = ("preconditioner", "preconditioner_momenta")
    expected: dict[str, tuple[int, ...]] = {
        f"{kind}.{name}": shape for kind in kinds for name, shape in matrices.items()
    }
    counters: dict[str, tuple[int, ...]] = dict.fromkeys(
        ["step", "skipped", "failed", "begun", "overdue", "global_step", "batch_size"], ()
    )
    assert shapes == {**expected, **counters, "momentum_buffer": (4, 4)}


def test_state_entries_alias_the_stacks_and_no_other_unit() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model)
    for entry in optimizer.state.values():
        entry["momentum_buffer"].fill_(3.0)
        entry["preconditioner.0.mat"].fill_(2.0)
    for bucket in optimizer.buckets:
        state: Any = bucket.state
        assert state.momentum_buffer.eq(3.0).all()
        assert state.preconditioner[0].to_dense().eq(2.0).all()
    own = optimizer.state[model[2].weight]["momentum_buffer"].zero_()
    assert not own.any()
    assert optimizer.state[model[4].weight]["momentum_buffer"].eq(3.0).all()


def test_state_of_a_stacked_unit_has_a_row_per_problem() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)).double()
    rules = (SplitHeads("*.weight", heads=2), PerParameter())
    optimizer = SIRFShampoo(model, combine_params=rules)
    entry = optimizer.state[model[1].weight]
    assert entry["momentum_buffer"].shape == (2, 2, 4)
    assert entry["preconditioner.0.mat"].shape == (2, 2, 2)
    assert entry["step"].shape == (2,)
    factors = dict(zip(optimizer.state, optimizer.preconditioner, strict=True))
    assert [f.shape for f in factors[model[1].weight] if f] == [(2, 2, 2), (2, 4, 4)]


def _assign(entry: dict[str, Tensor], name: str, value: Tensor) -> None:
    entry[name] = value


def _update(entry: dict[str, Tensor], name: str, value: Tensor) -> None:
    entry.update({name: value})


def _unite(entry: dict[str, Tensor], name: str, value: Tensor) -> None:
    entry |= {name: value}


def _replace(optimizer: StructuredOptimizer, p: Tensor, name: str, value: Tensor) -> None:
    optimizer.state[p] = {**optimizer.state[p], name: value}


def _replace_all(optimizer: StructuredOptimizer, p: Tensor, name: str, value: Tensor) -> None:
    plain = {q: {k: t.clone() for k, t in entry.items()} for q, entry in optimizer.state.items()}
    plain[p][name] = value
    optimizer.state = defaultdict(dict, plain)


WRITERS: dict[str, Callable[[StructuredOptimizer, Tensor, str, Tensor], None]] = {
    "one name": lambda o, p, name, value: _assign(o.state[p], name, value),
    "update": lambda o, p, name, value: _update(o.state[p], name, value),
    "union": lambda o, p, name, value: _unite(o.state[p], name, value),
    "one entry": _replace,
    "all of state": _replace_all,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_written_state_takes_effect_on_the_next_step(
    write: Callable[[StructuredOptimizer, Tensor, str, Tensor], None],
) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, dense = SIRFShampoo(model, **SETTINGS), dense_units(twin)
    train(model, optimizer, 2)
    _train_dense(twin, dense, 2)
    (problem,) = next(unit for unit in dense if unit.params[0] is twin[4].weight).problems
    problem.buf = torch.full((4, 4), 0.5).double()
    write(optimizer, model[4].weight, "momentum_buffer", torch.full((4, 4), 0.5))  # float32
    train(model, optimizer, 2, start=2)
    _train_dense(twin, dense, 2, start=2)
    assert_close(values(model), values(twin))
    shown = optimizer.state[model[4].weight]
    assert_close(shown["momentum_buffer"], problem.buf)
    index = [name for name, _ in model.named_parameters()].index("4.weight")
    assert_close(optimizer.state_dict()["state"][index]["momentum_buffer"], problem.buf)


def _drop(optimizer: StructuredOptimizer, p: Tensor) -> None:
    del optimizer.state[p]


def _clear(optimizer: StructuredOptimizer, p: Tensor) -> None:
    optimizer.state.clear()


def _empty(optimizer: StructuredOptimizer, p: Tensor) -> None:
    optimizer.state[p] = {}


def _reshape(optimizer: StructuredOptimizer, p: Tensor) -> None:
    entry = optimizer.state[p]
    optimizer.state[p] = {**entry, "momentum_buffer": torch.zeros(16)}


def _delete_name(optimizer: StructuredOptimizer, p: Tensor) -> None:
    del optimizer.state[p]["momentum_buffer"]


@pytest.mark.parametrize("damage", [_drop, _clear, _empty, _reshape, _delete_name])
def test_removed_or_misshapen_state_raises_and_names_the_unit(
    damage: Callable[[StructuredOptimizer, Tensor], None],
) -> None:
    model = mlp()
    optimizer = SIRFShampoo(model)
    train(model, optimizer, 1)
    before = values(model)

    def damage_and_step() -> None:
        damage(optimizer, model[4].weight)
        optimizer.step()

    with pytest.raises((StructPrecondError, TypeError), match=r"4\.weight|0\.weight"):
        damage_and_step()
    assert same_bits(values(model), before)


def test_writing_an_unknown_name_or_another_shape_raises() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model)
    entry = optimizer.state[model[0].weight]
    before = snapshot(model, optimizer)
    with pytest.raises(StructPrecondError, match=r"0\.weight"):
        entry["exp_avg"] = torch.zeros(4, 3)
    with pytest.raises(StructPrecondError, match=r"0\.weight"):
        entry["momentum_buffer"] = torch.zeros(3, 4)
    with pytest.raises(StructPrecondError, match=r"0\.weight"):
        entry.update({"momentum_buffer": torch.ones(4, 3), "exp_avg": torch.zeros(4, 3)})
    assert same_bits(snapshot(model, optimizer), before)


@pytest.mark.parametrize("copier", COPIERS)
def test_state_can_be_copied_by_itself(copier: Callable[[Any], Any]) -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, **SETTINGS)
    train(model, optimizer, 2)
    backup = [copier(entry) for entry in optimizer.state.values()]
    before = [{k: t.clone() for k, t in entry.items()} for entry in optimizer.state.values()]
    train(model, optimizer, 2, start=2)
    assert same_bits([dict(entry) for entry in backup], before)


# --- memory formats and devices -----------------------------------------------------------------


def test_memory_format_of_parameters_and_gradients_does_not_matter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(36, 2)).double()
    other: Any = copy.deepcopy(model)
    other.to(memory_format=torch.channels_last)
    optimizer, reference = (SIRFShampoo(m, batch_size=2, **SETTINGS) for m in (other, model))
    for step in range(4):
        for m, o in ((other, optimizer), (model, reference)):
            x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step)).double()
            o.zero_grad()
            m(x).square().sum(1).mean().backward()
            o.step()
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(values(other), values(model))


def test_default_device_at_construction_does_not_matter() -> None:
    # the meta device stands for a GPU here: torch.set_default_device("cuda") is common
    model = mlp()
    twin = copy.deepcopy(model)
    with torch.device("meta"):
        optimizer = SIRFShampoo(model, batch_size=6, **SETTINGS)
    train(model, optimizer, 2)
    _train_dense(twin, dense_units(twin), 2)
    assert_close(values(model), values(twin))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_cuda
@pytest.mark.parametrize("missing", [False, True])
def test_state_follows_a_model_that_moves_to_another_device(missing: bool) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, batch_size=6, **SETTINGS)
    reference = SIRFShampoo(twin, batch_size=6, **SETTINGS)
    for step in range(6):
        if step == 3:
            model.cuda()
        for m, o in ((model, optimizer), (twin, reference)):
            set_grads(list(m.parameters()), step)
            for p in m.parameters():
                assert p.grad is not None
                p.grad = p.grad.to(p.device)
            if missing:
                m[2].weight.grad = None
            o.step()
    assert all(p.is_cuda for p in model.parameters())
    assert optimizer.state[model[0].weight]["momentum_buffer"].is_cuda
    assert_close([v.cpu() for v in values(model)], values(twin), 1e-10)


# --- gradients that are not finite ---------------------------------------------------------------

BAD = [torch.inf, -torch.inf, torch.nan]


def _spoil(p: Tensor, value: float) -> None:
    assert p.grad is not None
    p.grad.view(-1)[-1] = value


@pytest.mark.parametrize("bad", BAD)
def test_nonfinite_gradients_skip_their_unit_alone(bad: float) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, dense = SIRFShampoo(model, **SETTINGS), dense_units(twin)
    victims = {3: [model[2].weight], 4: [model[2].weight, model[4].bias]}
    params = list(model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            for m in (model, twin):
                m.zero_grad()
                backward(m, step)
            for p in victims.get(step, []):
                _spoil(p, bad)
            before = snapshot(model, optimizer)
            optimizer.step()
            after = snapshot(model, optimizer)
            for i, (unit, p) in enumerate(zip(dense, params, strict=True)):
                if not any(p is victim for victim in victims.get(step, [])):
                    unit.step(6)
                    continue
                name = optimizer.name_of(params[i])
                assert same_bits(after["params"][name], before["params"][name])
                old, new = before["shown"][name], after["shown"][name]
                changed = {key for key in new if not same_bits(old[key], new[key])}
                assert changed == {"skipped", "global_step"}
    assert_close(values(model), values(twin))
    assert optimizer.skipped == 3
    assert optimizer.state[model[2].weight]["skipped"].item() == 2
    assert optimizer.state[model[4].bias]["skipped"].item() == 1
    assert [w.category for w in caught] == [UserWarning]
    assert "2.weight" in str(caught[0].message)


@pytest.mark.filterwarnings("ignore:The gradients of")
def test_nonfinite_gradient_of_one_member_skips_the_whole_unit() -> None:
    model = mlp()
    rules = (LinearWeightBias(), SplitHeads("6.weight", 2), PerParameter())
    optimizer = SIRFShampoo(model, combine_params=(rules[1], rules[0], rules[2]), **SETTINGS)
    backward(model, 0)
    _spoil(model[2].bias, torch.nan)
    _spoil(model[6].weight, torch.inf)
    before = values(model)
    optimizer.step()
    moved = [not same_bits(a, b) for a, b in zip(values(model), before, strict=True)]
    assert moved == [True, True, False, False, True, True, False, True]
    assert optimizer.skipped == 2


@pytest.mark.parametrize("bad", BAD)
def test_nonfinite_raise_names_the_parameter_and_changes_nothing(bad: float) -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, nonfinite="raise", **SETTINGS)
    train(model, optimizer, 2)
    backward(model, 2)
    _spoil(model[4].bias, bad)
    before = snapshot(model, optimizer)
    with pytest.raises(GradientError, match=r"4\.bias.*step 2"):
        optimizer.step()
    assert same_bits(snapshot(model, optimizer), before)


def test_nonfinite_ignore_spoils_no_other_row_of_the_stack() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, dense = SIRFShampoo(model, nonfinite="ignore", **SETTINGS), dense_units(twin)
    for m in (model, twin):
        backward(m, 0)
    _spoil(model[2].weight, torch.nan)
    optimizer.step()
    for unit in dense:
        unit.step(6)
    assert model[2].weight.isnan().any()
    assert optimizer.skipped == 0
    others = [i for i, p in enumerate(model.parameters()) if p is not model[2].weight]
    assert_close([values(model)[i] for i in others], [values(twin)[i] for i in others])


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e30), (torch.bfloat16, 1e38), (torch.float64, 1e60)]
)
def test_large_finite_gradients_are_not_taken_for_infinite(dtype: torch.dtype, size: float) -> None:
    p = nn.Parameter(torch.zeros(4, dtype=dtype))
    optimizer = SIRFShampoo([p], batch_size=1, lr=1e-3 / size, T=lambda step: False)
    p.grad = torch.full_like(p, size)
    optimizer.step()
    assert optimizer.skipped == 0
    assert_close(p.detach().double(), torch.full((4,), -1e-3).double(), 1e-2)


# --- stacking ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "structure", ["dense", "diagonal", "block3diagonal", "triltoeplitz", "none"]
)
def test_stacked_units_train_as_one_at_a_time(structure: str) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SIRFShampoo(model, structures=structure, batch_size=6, **SETTINGS)
    assert max(bucket.rows for bucket in optimizer.buckets) > 1
    singles = [
        SIRFShampoo([p], structures=structure, batch_size=6, **SETTINGS) for p in twin.parameters()
    ]
    for step in range(8):
        set_grads(list(model.parameters()), step)
        set_grads(list(twin.parameters()), step)
        optimizer.step()
        for single in singles:
            single.step()
    assert_close(values(model), values(twin))


@pytest.mark.parametrize("axis", [0, 1])
def test_split_heads_train_as_separately_owned_heads(axis: int) -> None:
    fused = nn.ParameterList([torch.randn(6, 6).double() for _ in range(2)])
    separate = [[h.clone() for h in p.detach().chunk(3, dim=axis)] for p in fused]
    rules = (SplitHeads("*", heads=3, axis=axis),)
    optimizer = SIRFShampoo(fused, combine_params=rules, batch_size=6, **SETTINGS)
    heads = [nn.Parameter(h) for group in separate for h in group]
    singles = [SIRFShampoo([h], batch_size=6, **SETTINGS) for h in heads]
    for step in range(6):
        set_grads(list(fused), step)
        grads = [g for p in fused for g in (p.grad if p.grad is not None else p).chunk(3, dim=axis)]
        for h, g in zip(heads, grads, strict=True):
            h.grad = g.clone()
        optimizer.step()
        for single in singles:
            single.step()
    for i, p in enumerate(fused):
        joined = torch.cat([h.detach() for h in heads[3 * i : 3 * i + 3]], dim=axis)
        assert_close(p.detach(), joined)


@dataclass(frozen=True)
class CopyingPair(LinearWeightBias):
    """As its base, without views."""

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        return [t.clone() for t in super().ungroup(grouped_tensor, tensor_shapes)]


@dataclass(frozen=True)
class CopyingSingle(PerParameter):
    """As its base, without views."""

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        return [t.clone() for t in super().ungroup(grouped_tensor, tensor_shapes)]


@dataclass(frozen=True)
class CopyingHeads(SplitHeads):
    """As its base, without views."""

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        return [t.clone() for t in super().ungroup(grouped_tensor, tensor_shapes)]


@pytest.mark.parametrize(
    ("viewing", "copying"),
    [
        (PerParameter(), CopyingSingle()),
        (LinearWeightBias(), CopyingPair()),
        (SplitHeads("*.weight", 2), CopyingHeads("*.weight", 2)),
    ],
)
def test_rule_whose_ungroup_copies_agrees_with_the_views_to_the_bit(
    viewing: PreconditionerGroup, copying: PreconditionerGroup
) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, other = (
        SIRFShampoo(m, combine_params=(rule, PerParameter()), batch_size=6, **SETTINGS)
        for m, rule in ((model, viewing), (twin, copying))
    )
    assert optimizer.buckets[0].layout._windows is not None
    assert other.buckets[0].layout._windows is None
    for step in range(6):
        for m, o in ((model, optimizer), (twin, other)):
            set_grads(list(m.parameters()), step)
            if step in (2, 3):
                m[2].weight.grad = m[2].bias.grad = None
            o.step()
        assert same_bits(values(model), values(twin))


# --- refresh intervals ---------------------------------------------------------------------------


def test_interval_callable_is_asked_once_per_step_about_the_global_step() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    asked: list[int] = []

    def T(step: int) -> bool:
        asked.append(step)
        return step in (0, 1, 4)

    optimizer, dense = SIRFShampoo(model, T=T, **SETTINGS), dense_units(twin)
    train(model, optimizer, 6)
    assert asked == list(range(6))
    for step in range(6):
        twin.zero_grad()
        backward(twin, step)
        for unit in dense:
            unit.step(6, refresh=step in (0, 1, 4))
    assert_close(values(model), values(twin))


def test_interval_callable_of_several_groups_is_asked_once_per_step() -> None:
    model = mlp()
    asked: list[int] = []

    def T(step: int) -> bool:
        asked.append(step)
        return True

    optimizer = SIRFShampoo(model, _two_groups(model), T=T)
    train(model, optimizer, 3)
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("T", [1, 2, 3])
def test_interval_counts_steps(T: int) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, dense = SIRFShampoo(model, T=T, **SETTINGS), dense_units(twin)
    train(model, optimizer, 7)
    for step in range(7):
        twin.zero_grad()
        backward(twin, step)
        for unit in dense:
            unit.step(6, refresh=step % T == 0)
    assert_close(values(model), values(twin))


def test_staggered_refreshes_take_turns_and_keep_the_interval() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = StructuredOptimizer(
        model,
        strategy=SIRFShampooStrategy(),
        hyperparameters={**SETTINGS, "T": 4},
        refresh="staggered",
        batch_size=6,
    )
    dense, params = dense_units(twin), list(model.parameters())
    refreshed: dict[int, list[int]] = {i: [] for i in range(len(params))}
    for step in range(12):
        for m in (model, twin):
            set_grads(list(m.parameters()), step)
        before = [optimizer.state[p]["preconditioner.0.mat"].clone() for p in params]
        optimizer.step()
        for i, (p, unit) in enumerate(zip(params, dense, strict=True)):
            changed = not same_bits(optimizer.state[p]["preconditioner.0.mat"], before[i])
            refreshed[i] += [step] if changed else []
            unit.step(6, refresh=changed)
    assert_close(values(model), values(twin))
    for steps in refreshed.values():
        assert steps == list(range(steps[0], 12, 4))
        assert steps[0] < 4
    # 8 units take 4 turns, and the two 4x4 weights do not share one
    assert {steps[0] for steps in refreshed.values()} == {0, 1, 2, 3}
    assert refreshed[2] != refreshed[4]


@pytest.mark.parametrize("how", ["missing", "frozen", "not finite"])
@pytest.mark.parametrize("kind", ["int", "callable"])
@pytest.mark.filterwarnings("ignore:The gradients of")
def test_unit_that_missed_its_refresh_is_refreshed_at_its_next_live_step(
    kind: str, how: str
) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    T: Any = 3 if kind == "int" else lambda step: step % 3 == 0
    optimizer = SIRFShampoo(model, T=T, batch_size=6, **SETTINGS)
    dense, victim = dense_units(twin), model[4].weight
    # steps 3 and 4 are missed; an integer goes by the unit's own steps: 0, 3, 6 are 0, 5, 8
    own = {0, 5, 8} if kind == "int" else {0, 5, 6, 9}
    for step in range(10):
        for m in (model, twin):
            set_grads(list(m.parameters()), step)
        missed = step in (3, 4)
        if missed and how == "missing":
            victim.grad = None
        elif missed and how == "not finite":
            _spoil(victim, torch.nan)
        victim.requires_grad_(not (missed and how == "frozen"))
        optimizer.step()
        for unit in dense:
            mine = unit.params[0] is twin[4].weight
            if not (mine and missed):
                unit.step(6, refresh=step in own if mine else step % 3 == 0)
    assert_close(values(model), values(twin))


# --- torch's hooks -------------------------------------------------------------------------------


def test_step_hooks_run_around_every_step_and_see_its_arguments() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, batch_size=6, **SETTINGS)
    seen: list[Any] = []

    def before(opt: Any, args: Any, kwargs: Any) -> None:
        seen.append(("before", opt is optimizer, opt.global_step))

    def after(opt: Any, args: Any, kwargs: Any) -> None:
        seen.append(("after", opt is optimizer, opt.global_step))

    handles = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(after),
    ]
    train(model, optimizer, 2)
    expected = [("before", True, 0), ("after", True, 1), ("before", True, 1), ("after", True, 2)]
    assert seen == expected
    for handle in handles:
        handle.remove()
    train(model, optimizer, 1)
    assert seen == expected


def test_step_pre_hook_may_change_the_gradients() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, dense = SIRFShampoo(model, **SETTINGS), dense_units(twin)

    def clip(opt: Any, args: Any, kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    optimizer.register_step_pre_hook(clip)
    train(model, optimizer, 3)
    for step in range(3):
        twin.zero_grad()
        backward(twin, step)
        grads = [p.grad for p in twin.parameters() if p.grad is not None]
        total = sum(grad.square().sum().item() for grad in grads) ** 0.5
        assert total > 0.1
        for grad in grads:
            grad *= 0.1 / (total + 1e-6)
        for unit in dense:
            unit.step(6)
    assert_close(values(model), values(twin))


def test_state_dict_hooks_run_and_may_replace_the_state_dict() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("pre"))

    def post(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("post")
        return {**state_dict, "extra": 1}

    handle = optimizer.register_state_dict_post_hook(post)
    assert optimizer.state_dict()["extra"] == 1
    assert calls == ["pre", "post"]
    handle.remove()
    assert "extra" not in optimizer.state_dict()


def test_load_state_dict_hooks_run_and_may_replace_what_is_loaded() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, **SETTINGS)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    fresh = SIRFShampoo(mlp())
    steps: list[int] = []

    def pre(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        steps.append(opt.global_step)
        wrapped: dict[str, Any] = state_dict["wrapped"]
        return wrapped

    fresh.register_load_state_dict_pre_hook(pre)
    fresh.register_load_state_dict_post_hook(lambda opt: steps.append(fresh.global_step))
    fresh.load_state_dict({"wrapped": saved})
    assert steps == [0, 2]
    assert same_bits(fresh.state_dict()["state"], saved["state"])


# --- strategies of a group's own -----------------------------------------------------------------


@dataclass
class Nothing(State):
    """No state."""


@dataclass(frozen=True)
class PlainDescent(Strategy[Nothing]):
    """Gradient descent with decoupled weight decay."""

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "lr": Hyperparameter(0.1, lambda v: v >= 0, "at least 0"),
        "weight_decay": Hyperparameter(0.0, lambda v: v >= 0, "at least 0"),
    }
    decay: ClassVar[Literal["before", "after", "inside"]] = "before"

    def init(self, like: Tensor, structures: Any, dtypes: Any) -> Nothing:
        return Nothing()

    def update(
        self, state: Nothing, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext
    ) -> Tensor:
        return grad


@dataclass(frozen=True)
class LateDecay(PlainDescent):
    """The same, decaying after the update."""

    decay = "after"


@pytest.mark.parametrize("strategy", [PlainDescent(), LateDecay()], ids=["before", "after"])
def test_decoupled_weight_decay_comes_before_or_after_the_update(strategy: PlainDescent) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    settings = {"lr": 0.1, "weight_decay": 0.3}
    optimizer = StructuredOptimizer(model, strategy=strategy, hyperparameters=settings)
    train(model, optimizer, 3)
    for step in range(3):
        twin.zero_grad()
        backward(twin, step)
        with torch.no_grad():
            for p in twin.parameters():
                assert p.grad is not None
                if strategy.decay == "before":
                    p.copy_(p - 0.03 * p - 0.1 * p.grad)
                else:
                    p.copy_((p - 0.1 * p.grad) * 0.97)
    assert_close(values(model), values(twin))


def test_group_may_bring_a_strategy_structures_and_rules_of_its_own() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    groups = [
        {"params": model[0].parameters(), "strategy": PlainDescent()},
        {"params": model[2].parameters(), "structures": "diagonal"},
        {"params": model[4:].parameters(), "combine_params": (LinearWeightBias(),)},
    ]
    optimizer = StructuredOptimizer(
        model,
        groups,
        strategy=SIRFShampooStrategy(),
        hyperparameters=SETTINGS,
        batch_size=6,
    )
    assert set(PlainDescent.hyperparameters) <= set(optimizer.param_groups[0])
    assert "alpha1" not in optimizer.param_groups[0]
    assert optimizer.param_groups[0]["lr"] == SETTINGS["lr"]
    diagonal = [DenseUnit([p], structures=["diagonal"] * p.ndim) for p in twin[2].parameters()]
    pairs = [linear_unit(twin[i]) for i in (4, 6)]
    train(model, optimizer, 4)
    for step in range(4):
        twin.zero_grad()
        backward(twin, step)
        with torch.no_grad():
            for p in twin[0].parameters():
                assert p.grad is not None
                p -= 0.05 * p.grad
        for unit in diagonal + pairs:
            unit.step(6)
    assert_close(values(model), values(twin))


# --- training against the book -------------------------------------------------------------------


class Everything(nn.Module):
    """An embedding, a fused projection, a convolution, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.qkv = nn.Linear(4, 12)
        self.out = nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 3, 3, padding=1)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 1)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embedding(tokens)).chunk(3, dim=-1)
        mixed = self.out(torch.softmax(q @ k.mT, dim=-1) @ v)
        scores: Tensor = self.head(self.norm(self.conv(mixed.mT).mT))
        return scores.mean((1, 2))


def _heads(p: Tensor, heads: int, axis: int) -> DenseUnit:
    def join(problems: list[Tensor]) -> list[Tensor]:
        return [torch.cat(problems, dim=axis)]

    return DenseUnit([p], lambda ts: list(ts[0].chunk(heads, dim=axis)), join)


RULES: dict[
    str, tuple[tuple[PreconditionerGroup, ...], Callable[[Everything], list[DenseUnit]]]
] = {
    "PerParameter": ((PerParameter(),), lambda m: [DenseUnit([p]) for p in m.parameters()]),
    "LinearWeightBias": (
        (LinearWeightBias(), PerParameter()),
        lambda m: [
            *(linear_unit(layer) for layer in (m.qkv, m.out, m.head)),
            *(DenseUnit([p]) for part in (m.embedding, m.conv, m.norm) for p in part.parameters()),
        ],
    ),
    "FlattenEmbedding": (
        (FlattenEmbedding(), PerParameter()),
        lambda m: [
            DenseUnit(
                [m.embedding.weight],
                lambda ts: [ts[0].flatten()],
                lambda ps: [ps[0].reshape(7, 4)],
            ),
            *(DenseUnit([p]) for p in m.parameters() if p is not m.embedding.weight),
        ],
    ),
    "SplitHeads": (
        (SplitHeads("qkv.*", heads=6), SplitHeads("out.weight", heads=2, axis=1), PerParameter()),
        lambda m: [
            _heads(m.qkv.weight, 6, 0),
            _heads(m.qkv.bias, 6, 0),
            _heads(m.out.weight, 2, 1),
            *(DenseUnit([p]) for p in (m.embedding.weight, m.out.bias)),
            *(DenseUnit([p]) for part in (m.conv, m.norm, m.head) for p in part.parameters()),
        ],
    ),
}


@pytest.mark.parametrize(
    ("T", "changes"),
    [(1, {}), (3, {"alpha1": 0.0}), (2, {"alpha2": 0.0, "kappa": 0.0})],
    ids=["all terms", "no momentum", "no momentum of the factors"],
)
@pytest.mark.parametrize("rule", RULES)
def test_training_follows_the_published_rule(rule: str, T: int, changes: dict[str, float]) -> None:
    model = Everything()
    twin = copy.deepcopy(model)
    rules, units = RULES[rule]
    settings = SETTINGS | changes
    optimizer = SIRFShampoo(model, combine_params=rules, T=T, **settings)
    dense = units(twin)
    assert sum(len(unit.params) for unit in dense) == len(list(twin.parameters()))
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(7, (5, 3), generator=generator)
        for m in (model, twin):
            m.zero_grad()
            (m(tokens) - tokens.sum(1)).square().mean().backward()
        optimizer.step()
        for unit in dense:
            unit.step(5, refresh=step % T == 0, **settings)
    assert_close(values(model), values(twin), 1e-11)
