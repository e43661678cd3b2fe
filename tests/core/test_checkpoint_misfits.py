"""A checkpoint that does not fit raises an error and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from structprecond import (
    CheckpointError,
    LinearWeightBias,
    PerParameter,
    StructuredOptimizer,
)
from tests.helpers import (
    WithBetas,
    mlp,
    same_bits,
    set_grads,
    sirf,
    snapshot,
    through_a_file,
    train,
    values,
    with_betas,
)


class Renamed(nn.Sequential):
    """The same layers under other names."""

    def __init__(self) -> None:
        super().__init__()
        for name, module in mlp().named_children():
            self.add_module(f"layer{name}", module)


def _wider() -> nn.Module:
    model = mlp()
    model[6] = nn.Linear(4, 3).double()
    return model


def _shorter() -> nn.Module:
    return mlp()[:6]


def _two_groups(model: Any) -> list[dict[str, Any]]:
    return [{"params": model[:2].parameters()}, {"params": model[2:].parameters()}]


Build = Callable[[], tuple[nn.Module, StructuredOptimizer]]


def _build(make: Callable[[], nn.Module] = mlp, **kwargs: Any) -> Build:
    def build() -> tuple[nn.Module, StructuredOptimizer]:
        model = make()
        return model, sirf(model, **kwargs)

    return build


def _build_grouped() -> tuple[nn.Module, StructuredOptimizer]:
    model = mlp()
    return model, sirf(model, _two_groups(model))


def _build_otherwise() -> tuple[nn.Module, StructuredOptimizer]:
    model = mlp()
    return model, StructuredOptimizer(model, strategy=WithBetas())


def _same(saved: dict[str, Any]) -> Any:
    return saved


def _without_a_unit(saved: dict[str, Any]) -> Any:
    del saved["state"][2]
    return saved


def _without_a_name(saved: dict[str, Any]) -> Any:
    del saved["state"][2]["momentum_buffer"]
    return saved


def _with_a_name(saved: dict[str, Any]) -> Any:
    saved["state"][2]["exp_avg"] = torch.zeros(3)
    return saved


def _misshapen(saved: dict[str, Any]) -> Any:
    saved["state"][7]["momentum_buffer"] = torch.zeros(3)
    return saved


def _flattened(saved: dict[str, Any]) -> Any:
    saved["state"][0]["momentum_buffer"] = saved["state"][0]["momentum_buffer"].flatten()
    return saved


def _not_a_tensor(saved: dict[str, Any]) -> Any:
    saved["state"][7]["momentum_buffer"] = "lost"
    return saved


def _without_groups(saved: dict[str, Any]) -> Any:
    return {"state": saved["state"]}


def _of_the_future(saved: dict[str, Any]) -> Any:
    saved["param_groups"][0]["format"] = 999
    return saved


def _of_a_model(saved: dict[str, Any]) -> Any:
    return mlp().state_dict()


def _of_adam(saved: dict[str, Any]) -> Any:
    model = mlp()
    adam = torch.optim.Adam(model.parameters())
    train(model, adam, 1)
    return adam.state_dict()


def _of_adam_with_names(saved: dict[str, Any]) -> Any:
    model = mlp()
    adam = torch.optim.Adam(model.named_parameters())
    train(model, adam, 1)
    return adam.state_dict()


def _no_dict(saved: dict[str, Any]) -> Any:
    return [saved]


MISFITS: dict[str, tuple[Build, Callable[[dict[str, Any]], Any], str]] = {
    "other structures": (_build(structures="diagonal"), _same, "structures"),
    "other structures in a dict": (
        _build(structures={1: "dense", 2: ("dense", "diagonal")}),
        _same,
        "structures",
    ),
    "other shapes": (_build(_wider), _same, r"6\.weight.*\(2, 4\).*\(3, 4\)"),
    "other rule": (_build(combine_params=(LinearWeightBias(), PerParameter())), _same, "combine"),
    "other strategy": (_build_otherwise, _same, "strategy"),
    "other names": (_build(Renamed), _same, r"layer0\.weight"),
    "fewer parameters": (_build(_shorter), _same, "8.*6"),
    "other groups": (_build_grouped, _same, r"8.*2, 6"),
    "missing unit": (_build(), _without_a_unit, r"2\.weight"),
    "missing entry": (_build(), _without_a_name, r"2\.weight.*momentum_buffer"),
    "unexpected entry": (_build(), _with_a_name, r"2\.weight.*exp_avg"),
    "misshapen entry": (_build(), _misshapen, r"6\.bias.*momentum_buffer.*\(3,\).*\(2,\)"),
    "flattened entry": (_build(), _flattened, r"0\.weight.*momentum_buffer.*\(12,\).*\(4, 3\)"),
    "no tensor": (_build(), _not_a_tensor, r"6\.bias.*momentum_buffer.*lost"),
    "no groups": (_build(), _without_groups, "param_groups"),
    "later format": (_build(), _of_the_future, "999"),
    "a model's": (_build(), _of_a_model, "param_groups"),
    "Adam's": (_build(), _of_adam, "not a checkpoint of a structured optimizer"),
    "Adam's with names": (_build(), _of_adam_with_names, "not a checkpoint of a structured"),
    "a list": (_build(), _no_dict, "not a checkpoint of a structured optimizer"),
}


@pytest.mark.parametrize(("build", "damage", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_checkpoint_that_does_not_fit_says_so_and_changes_nothing(
    build: Build, damage: Callable[[dict[str, Any]], Any], message: str
) -> None:
    saving_model = mlp()
    saving = sirf(saving_model)
    train(saving_model, saving, 3)
    saved = damage(through_a_file(saving.state_dict()))
    kept = copy.deepcopy(saved)
    model, optimizer = build()
    set_grads(list(model.parameters()), 0)
    optimizer.batch_size = 6
    optimizer.step()
    before = snapshot(model, optimizer)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        optimizer.load_state_dict(saved)
    assert same_bits(snapshot(model, optimizer), before)
    assert same_bits(saved, kept)


def test_strategy_with_another_configuration_does_not_fit() -> None:
    saved = with_betas(WithBetas(amount=3)).state_dict()
    with pytest.raises(CheckpointError, match=r"amount=3.*amount=2"):
        with_betas(WithBetas(amount=2)).load_state_dict(saved)


def test_message_about_many_differences_stays_short() -> None:
    saved = sirf(nn.ModuleList(nn.Linear(2, 2) for _ in range(50)), batch_size=1).state_dict()
    other = sirf(nn.ModuleList(nn.Linear(3, 3) for _ in range(50)), batch_size=1)
    with pytest.raises(CheckpointError, match=r"(?s)0\.weight.*and \d+ more") as caught:
        other.load_state_dict(saved)
    assert len(str(caught.value).splitlines()) < 40


def test_failing_load_leaves_training_to_go_on_to_the_bit() -> None:
    model = mlp()
    optimizer = sirf(model)
    train(model, optimizer, 2)
    twin, clone = copy.deepcopy((model, optimizer))
    saved = optimizer.state_dict()
    saved["state"][7]["momentum_buffer"] = torch.zeros(3)
    saved["param_groups"][0]["lr"] = 100.0
    with pytest.raises(CheckpointError):
        optimizer.load_state_dict(saved)
    train(model, optimizer, 3, start=2)
    train(twin, clone, 3, start=2)
    assert same_bits(values(model), values(twin))


def test_other_optimizers_refuse_or_load_but_do_not_mix() -> None:
    model = mlp()
    optimizer = sirf(model)
    train(model, optimizer, 1)
    adam = torch.optim.Adam(list(model.parameters())[:3])
    with pytest.raises(ValueError, match="parameter group"):
        adam.load_state_dict(optimizer.state_dict())
