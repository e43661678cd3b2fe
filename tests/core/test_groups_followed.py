"""What other code does to `param_groups` is followed or refused, and never ignored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from structprecond import (
    SOAP,
    AdamW,
    AdamWStrategy,
    GroupError,
    LinearWeightBias,
    PerParameter,
    SIRFShampoo,
    SOAPStrategy,
    StructPrecondError,
    describe,
)
from structprecond.core.optimizer import StructuredOptimizer
from tests.helpers import SETTINGS, mlp, same_bits, set_grads, snapshot, train, values


def _halves(model: Any) -> list[dict[str, Any]]:
    return [
        {"params": list(model[:4].parameters())},
        {"params": list(model[4:].parameters()), "lr": 0.02},
    ]


def _two(**kwargs: Any) -> tuple[Any, SIRFShampoo]:
    model = mlp()
    optimizer = SIRFShampoo(model, _halves(model), **SETTINGS | kwargs)
    train(model, optimizer, 2)
    return model, optimizer


def _moved(model: nn.Module, optimizer: Any) -> list[bool]:
    """Make two steps, of which the first may only initialize; return which parameters moved."""
    before = values(model)
    set_grads(list(model.parameters()), 9)
    optimizer.step()
    optimizer.step()
    return [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]


# --- followed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["shallow", "with its own list"])
def test_hyperparameters_are_read_from_a_copied_group(shared: bool) -> None:
    model, optimizer = _two()
    twin, reference = copy.deepcopy((model, optimizer))
    group = dict(optimizer.param_groups[0])
    group["params"] = group["params"] if shared else list(group["params"])
    optimizer.param_groups[0] = group
    for one in (optimizer, reference):
        one.param_groups[0]["lr"] = 0.001
    train(model, optimizer, 3, start=2)
    train(twin, reference, 3, start=2)
    assert same_bits(values(model), values(twin))
    optimizer.param_groups[0]["lr"] = 0.0
    assert _moved(model, optimizer) == [False] * 4 + [True] * 4


def test_all_groups_may_be_replaced_as_torch_does_when_it_loads() -> None:
    model, optimizer = _two()
    optimizer.param_groups = [dict(group, lr=0.0) for group in optimizer.param_groups]
    assert not any(_moved(model, optimizer))


@pytest.mark.parametrize("number", [0, 1])
def test_popped_groups_stop(number: int) -> None:
    model, optimizer = _two()
    twin, reference = copy.deepcopy((model, optimizer))
    optimizer.param_groups.pop(number)
    for p in reference.param_groups[number]["params"]:
        p.requires_grad_(False)
    stays = slice(4, None) if number == 0 else slice(0, 4)
    for step in range(3):
        for m, o in ((model, optimizer), (twin, reference)):
            set_grads(list(m.parameters()), step)
            o.step()
    assert same_bits(values(model), values(twin))
    assert set(optimizer.state) == {*list(model.parameters())[stays]}
    popped = [p for p in model.parameters() if p not in optimizer.state]
    assert not optimizer.state[popped[0]]
    assert len(optimizer.state_dict()["state"]) == 4
    assert len(describe(optimizer).rows) == len(optimizer.buckets)


PARAMS: dict[str, tuple[Callable[[list[Any]], Any], list[bool]]] = {
    "emptied": (list.clear, [False] * 4),
    "first removed": (lambda params: params.pop(0), [False] + [True] * 3),
    "last removed": (lambda params: params.pop(), [True] * 3 + [False]),
    "reversed": (list.reverse, [True] * 4),
}


@pytest.mark.parametrize("replaced", [True, False])
@pytest.mark.parametrize(("change", "moves"), PARAMS.values(), ids=PARAMS)
def test_removed_parameters_stop(
    change: Callable[[list[Any]], Any], moves: list[bool], replaced: bool
) -> None:
    model, optimizer = _two()
    twin, reference = copy.deepcopy((model, optimizer))
    for p, on in zip(list(twin.parameters())[:4], moves, strict=True):
        p.requires_grad_(on)
    group = optimizer.param_groups[0]
    params = list(group["params"])
    change(params)
    if replaced:
        group["params"] = params
    else:
        change(group["params"])
    assert _moved(model, optimizer) == moves + [True] * 4
    _moved(twin, reference)
    assert same_bits(values(model), values(twin))
    # names stay with their parameters
    names = {p: name for name, p in model.named_parameters()}
    assert group["param_names"] == [names[p] for p in group["params"]]
    assert len(optimizer.state_dict()["state"]) == len(params) + 4


def test_rows_that_stay_keep_their_state_to_the_bit() -> None:
    model = nn.ParameterList([torch.randn(4, 3) for _ in range(5)])
    optimizer = SOAP(model, precondition_frequency=2, refresh="staggered", rounding="kahan")
    twin, reference = copy.deepcopy((model, optimizer))
    for step in range(9):
        for m, o in ((model, optimizer), (twin, reference)):
            set_grads(list(m), step)
            if step == 4 and o is optimizer:
                o.param_groups[0]["params"].pop(1)
            if step >= 4:
                m[1].grad = None
            o.step()
    assert same_bits(values(model), values(twin))
    assert optimizer.buckets[0].rows == 4
    for p, q in zip(model, twin, strict=True):
        if p is not model[1]:
            assert same_bits(dict(optimizer.state[p]), dict(reference.state[q]))


def test_assigned_state_is_taken_before_rows_are_dropped() -> None:
    model = nn.ParameterList([torch.randn(4, 3) for _ in range(3)])
    optimizer = AdamW(model)
    set_grads(list(model), 0)
    optimizer.step()
    entry = dict(optimizer.state[model[2]])
    optimizer.state[model[2]] = entry | {"exp_avg": torch.full((4, 3), 7.0)}
    optimizer.param_groups[0]["params"].pop(0)
    model[2].grad = None
    optimizer.step()
    assert torch.equal(optimizer.state[model[2]]["exp_avg"], torch.full((4, 3), 7.0))


def test_popped_parameters_may_be_added_again_and_start_fresh() -> None:
    model, optimizer = _two()
    params = optimizer.param_groups.pop(0)["params"]
    optimizer.add_param_group({"params": params, "lr": 0.01})
    assert _moved(model, optimizer) == [True] * 8
    assert int(optimizer.state[params[0]]["step"]) == 2
    assert int(optimizer.state[model[4].weight]["step"]) == 4


def test_groups_in_another_order_keep_their_parameters() -> None:
    model, optimizer = _two()
    optimizer.param_groups.reverse()
    optimizer.param_groups[1]["lr"] = 0.0
    assert _moved(model, optimizer) == [False] * 4 + [True] * 4


def test_parameters_without_a_model_are_followed_too() -> None:
    model = mlp()
    optimizer = AdamW(_halves(model))
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.0}
    optimizer.param_groups[1]["params"].pop(0)
    assert _moved(model, optimizer) == [False] * 5 + [True] * 3


def test_frozen_parameters_are_followed_before_they_have_state() -> None:
    model = mlp().requires_grad_(False)
    optimizer = AdamW(model, _halves(model), combine_params=(LinearWeightBias(), PerParameter()))
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.0}
    params = optimizer.param_groups[1]["params"]
    del params[:2]
    set_grads(list(model.parameters()), 0)
    optimizer.step()
    assert [r.unit.label for r in optimizer.frozen_units] == [
        f"{i}.weight + {i}.bias" for i in (0, 2, 6)
    ]
    model.requires_grad_(True)
    assert _moved(model, optimizer) == [False] * 6 + [True] * 2
    del params[0]
    with pytest.raises(GroupError, match=r"6\.weight was removed"):
        optimizer.step()


# --- refused -------------------------------------------------------------------------------------


def _swapped(model: Any, optimizer: Any) -> None:
    first, second = (group["params"] for group in optimizer.param_groups)
    first[0], second[0] = second[0], first[0]


def _split(model: Any, optimizer: Any) -> None:
    group = optimizer.param_groups[0]
    optimizer.param_groups.append({**group, "params": group["params"][2:]})
    group["params"] = group["params"][:2]


REFUSED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "longer": (
        lambda m, o: o.param_groups[0]["params"].append(nn.Parameter(torch.ones(2, 5))),
        r"param_groups\[0\]\['params'\]\[4\], of shape \(2, 5\).*add_param_group",
    ),
    "another": (
        lambda m, o: o.param_groups[1]["params"].__setitem__(0, nn.Parameter(torch.ones(4, 4))),
        r"param_groups\[1\]\['params'\]\[0\].*was not given",
    ),
    "others": (
        lambda m, o: o.param_groups[0].update(params=list(mlp().parameters())),
        r"param_groups\[0\]\['params'\]\[0\].*was not given",
    ),
    "twice": (
        lambda m, o: o.param_groups[0]["params"].append(m[0].weight), r"one twice.*0\.weight"
    ),
    "moved": (
        lambda m, o: o.param_groups[0]["params"].append(o.param_groups[1]["params"].pop()),
        r"param_groups\[0\] holds parameters of another group.*6\.bias",
    ),
    "swapped": (_swapped, r"param_groups\[0\] holds parameters of another group"),
    "split": (_split, r"param_groups\[2\] holds parameters of another group"),
    "appended": (
        lambda m, o: o.param_groups.append({"params": [nn.Parameter(torch.ones(3))]}),
        r"param_groups\[2\].*add_param_group",
    ),
    "appended, empty": (
        lambda m, o: o.param_groups.append({"params": []}), r"param_groups\[2\].*add_param_group"
    ),
    "no list": (
        lambda m, o: o.param_groups[0].update(params=m.parameters()), r"groups\[0\].*generator"
    ),
    "a parameter alone": (
        lambda m, o: o.param_groups[0].update(params=m[0].weight), r"list.*got Parameter"
    ),
    "no params": (lambda m, o: o.param_groups[0].pop("params"), r"param_groups\[0\].*got dict"),
    "no group": (lambda m, o: o.param_groups.__setitem__(1, 3), r"param_groups\[1\].*got int"),
    "lost lr": (lambda m, o: o.param_groups[0].pop("lr"), "no 'lr' any more"),
    "replaced without lr": (
        lambda m, o: o.param_groups.__setitem__(
            0, {k: v for k, v in o.param_groups[0].items() if k != "lr"}
        ),
        "no 'lr' any more",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_followed_is_refused_at_the_next_step(
    change: Callable[[Any, Any], Any], message: str
) -> None:
    model, optimizer = _two()
    set_grads(list(model.parameters()), 9)
    before, tensors = values(model), [b.named_tensors() for b in optimizer.buckets]
    tensors = copy.deepcopy(tensors)
    change(model, optimizer)
    with pytest.raises(StructPrecondError, match=f"(?s){message}"):
        optimizer.step()
    assert same_bits(values(model), before)
    assert same_bits([b.named_tensors() for b in optimizer.buckets], tensors)
    assert optimizer.global_step == 2


def test_a_refused_change_may_be_taken_back() -> None:
    model, optimizer = _two()
    twin, reference = copy.deepcopy((model, optimizer))
    group = optimizer.param_groups[0]
    group["params"].append(nn.Parameter(torch.ones(3)))
    with pytest.raises(StructPrecondError, match="was not given"):
        train(model, optimizer, 1, start=2)
    group["params"].pop()
    train(model, optimizer, 2, start=2)
    train(twin, reference, 2, start=2)
    assert same_bits(values(model), values(twin))


def test_a_part_of_a_joint_unit_cannot_be_removed() -> None:
    model = mlp()
    optimizer = SOAP(model, combine_params=(LinearWeightBias(), PerParameter()))
    optimizer.param_groups[0]["params"].pop(1)
    set_grads(list(model.parameters()), 0)
    before = snapshot(model, optimizer)
    with pytest.raises(GroupError, match=r"0\.bias was removed.*0\.weight \+ 0\.bias"):
        optimizer.step()
    assert same_bits(snapshot(model, optimizer), before)
    optimizer.param_groups[0]["params"].pop(0)
    assert _moved(model, optimizer) == [False, False, *[True] * 6]


def test_a_parameter_of_a_refused_change_is_not_added() -> None:
    _, optimizer = _two()
    first = optimizer.param_groups.pop(0)
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(3)))
    with pytest.raises(StructPrecondError, match="was not given"):
        optimizer.add_param_group({"params": first["params"]})
    assert len(optimizer.param_groups) == 1


# --- configuration -------------------------------------------------------------------------------


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "structures": ({"structures": "diagonal"}, "structures from 'dense' to 'diagonal'"),
    "strategy": ({"strategy": AdamWStrategy()}, r"strategy from SOAPStrategy\(\) to AdamWStr"),
    "same strategy": (
        {"strategy": SOAPStrategy(transport=True)},
        r"strategy from SOAPS.* to SOAPStrategy\(transport=T",
    ),
    "combine_params": (
        {"combine_params": (LinearWeightBias(), PerParameter())},
        r"combine_params from None to \(LinearWeightBias\(\), PerParameter\(\)\)",
    ),
    "dtypes": (
        {"preconditioner_dtypes": torch.bfloat16},
        "preconditioner_dtypes from None to torch.bfloat16",
    ),
    "two": (
        {"structures": None, "preconditioner_dtypes": torch.bfloat16},
        "structures from 'dense' to None, preconditioner_dtypes from",
    ),
    "of any kind": ({"structures": torch.ones(3)}, r"structures from 'dense' to tensor\(\["),
}


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_changed_configuration_raises_and_is_not_saved(
    change: dict[str, Any], message: str, replaced: bool
) -> None:
    model = mlp()
    optimizer = SOAP(model, structures="dense")
    set_grads(list(model.parameters()), 0)
    optimizer.step()
    saved, group = optimizer.state_dict(), optimizer.param_groups[0]
    if replaced:
        optimizer.param_groups[0] = {**group, **change}
    else:
        group.update(change)
    before = values(model)
    with pytest.raises(StructPrecondError, match=rf"group 0 was changed: {message}.*new optimizer"):
        optimizer.step()
    assert same_bits(values(model), before)
    assert same_bits(optimizer.state_dict(), saved)
    with pytest.raises(StructPrecondError, match="group 0 was changed"):
        optimizer.load_state_dict(saved)
    optimizer.param_groups[0].update({key: group[key] for key in group.keys() - change.keys()})
    optimizer.param_groups[0].update(structures="dense", preconditioner_dtypes=None)
    optimizer.param_groups[0].update(strategy=SOAPStrategy(), combine_params=None)
    assert all(_moved(model, optimizer))


def test_configuration_changed_in_place_raises() -> None:
    structures: dict[int, Any] = {}
    routes: dict[str, Any] = {"bias": AdamWStrategy(), "default": SOAPStrategy()}
    changes: tuple[Callable[[Any], Any], ...] = (
        lambda group: structures.update({1: "none"}),
        lambda group: structures.pop(1),
        lambda group: group["strategy"].update(bias=SOAPStrategy()),
    )
    for change in changes:
        model = mlp()
        structures.update({1: "diagonal", 2: ("dense", "diagonal")})
        routes["bias"] = AdamWStrategy()
        optimizer = StructuredOptimizer(model, strategy=routes, structures=structures)
        assert all(_moved(model, optimizer))
        change(optimizer.param_groups[0])
        with pytest.raises(StructPrecondError, match="configuration of param group 0"):
            _moved(model, optimizer)


def test_configuration_changed_before_a_copy_raises_in_the_copy() -> None:
    model = mlp()
    optimizer = SOAP(model)
    optimizer.param_groups[0]["structures"] = "diagonal"
    twin, other = copy.deepcopy((model, optimizer))
    with pytest.raises(StructPrecondError, match="configuration of param group 0"):
        _moved(twin, other)


def test_equal_configuration_may_replace_the_given_one() -> None:
    model = mlp()
    optimizer = SOAP(model, structures={1: "diagonal", 2: "dense"})
    optimizer.param_groups[0].update(
        strategy=SOAPStrategy(), structures={2: "dense", 1: "diagonal"}
    )
    assert all(_moved(model, optimizer))
