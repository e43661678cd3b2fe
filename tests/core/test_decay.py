"""Weight decay of param groups as other tools make them, and of what `no_decay` leaves out."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from structprecond import (
    LARS,
    SOAP,
    AdamW,
    CheckpointError,
    GroupError,
    HyperparameterError,
    LinearWeightBias,
    Muon,
    PerParameter,
    SIRFShampoo,
    StructPrecondError,
    StructuredOptimizer,
    describe,
)
from tests.core.routed import MIXED, net, train
from tests.every_strategy import OPTIMIZERS
from tests.helpers import same_bits, through_a_file, values

NEEDED: dict[Any, dict[str, Any]] = {LARS: {"lr": 0.1}, SIRFShampoo: {"batch_size": 32}}
VECTORS = {"conv1.bias", "conv2.bias", "norm.weight", "norm.bias", "hidden.bias", "head.bias"}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def decay_of(optimizer: StructuredOptimizer) -> dict[str, float | None]:
    """Return the weight decay of every unit."""
    return {u.label: b.weight_decay for b in optimizer.buckets for u in b.units}


def decay_groups(model: nn.Module, decay: float, **more: Any) -> list[dict[str, Any]]:
    """Return a decay and a no-decay group, as trainers make them."""
    named = dict(model.named_parameters())
    return [
        {
            "params": [p for n, p in named.items() if n not in VECTORS],
            "weight_decay": decay,
            **more,
        },
        {"params": [p for n, p in named.items() if n in VECTORS], "weight_decay": 0.0, **more},
    ]


# --- weight_decay in param groups ----------------------------------------------------------------


@every_optimizer
def test_decay_and_no_decay_groups_of_trainers_mean_what_they_say(optimizer: Any) -> None:
    model = net()
    made = optimizer(model, decay_groups(model, 0.3), **NEEDED.get(optimizer, {}))
    found = decay_of(made)
    assert {name for name, decay in found.items() if decay == 0.0} == VECTORS
    assert {decay for name, decay in found.items() if name not in VECTORS} == {0.3}
    # schedules of weight decay are followed by all strategies of the group
    made.param_groups[0]["weight_decay"] = 0.7
    assert {d for name, d in decay_of(made).items() if name not in VECTORS} == {0.7}
    made.param_groups[0]["weight_decay"] = -1.0
    with pytest.raises(HyperparameterError, match=r"weight_decay must be .* got -1\.0"):
        made.step()


def test_a_no_decay_group_trains_as_in_torch() -> None:
    model = net().double()
    twin = copy.deepcopy(model)
    both = Muon(model, decay_groups(model, 0.3), lr=0.02, adamw_betas=(0.8, 0.9))
    named = dict(twin.named_parameters())
    rest = [named["embedding.weight"], named["head.weight"]]
    vectors = [p for name, p in named.items() if name in VECTORS]
    adamw = torch.optim.AdamW(
        [{"params": rest, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.02,
        betas=(0.8, 0.9),
    )
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            q.grad = p.grad.clone()
        both.step()
        adamw.step()
    for name, p in model.named_parameters():
        if name in VECTORS or name in ("embedding.weight", "head.weight"):
            assert torch.allclose(p, named[name], rtol=1e-9, atol=1e-11), name


def test_a_decay_that_is_named_for_one_strategy_goes_before_the_groups() -> None:
    model = net()
    groups = decay_groups(model, 0.3)
    groups[0]["adamw_weight_decay"] = 0.05
    found = decay_of(Muon(model, groups))
    assert found["hidden.weight"] == 0.3
    assert found["embedding.weight"] == 0.05
    assert found["norm.weight"] == 0.0
    # without a weight_decay in the group, the constructor's hold
    found = decay_of(Muon(model, weight_decay=0.2, adamw_weight_decay=0.04))
    assert (found["hidden.weight"], found["embedding.weight"]) == (0.2, 0.04)
    found = decay_of(Muon(model, weight_decay=0.2, adamw_weight_decay=None))
    assert (found["hidden.weight"], found["embedding.weight"]) == (0.2, 0.2)


def test_the_optimizers_decay_is_that_of_its_routes() -> None:
    assert set(decay_of(SOAP(net(), weight_decay=0.1, routes="adamw")).values()) == {0.1}
    assert set(decay_of(SOAP(net(), routes="lars")).values()) == {0.01}
    # by their own names, each has its own default
    mixed = StructuredOptimizer(net(), strategy={"conv": "lars", "default": "adamw"})
    found = decay_of(mixed)
    assert (found["conv1.weight"], found["hidden.weight"]) == (0.0, 0.01)
    given = {"weight_decay": 0.2, "muon_weight_decay": 0.3}
    found = decay_of(StructuredOptimizer(net(), strategy=MIXED, hyperparameters=given))
    assert (found["conv1.weight"], found["hidden.weight"], found["head.bias"]) == (0.2, 0.3, 0.2)


def test_weight_decay_stands_for_kappa() -> None:
    model = net()
    params = list(model.parameters())
    optimizer = SIRFShampoo(model, params, batch_size=32, kappa=0.25, routes={"head": "adamw"})
    assert decay_of(optimizer)["hidden.weight"] == 0.25
    assert decay_of(optimizer)["head.weight"] == 0.01  # no weight_decay was given
    with pytest.raises(HyperparameterError, match=r"given kappa and weight_decay, which are the s"):
        SIRFShampoo(model, [{"params": params, "weight_decay": 0.1, "kappa": 0.1}])
    with pytest.raises(HyperparameterError, match=r"weight_decay must be .*got 'a'"):
        SIRFShampoo(model, [{"params": params, "weight_decay": "a"}])


@every_optimizer
def test_groups_with_a_decay_resume(optimizer: Any) -> None:
    model = net()
    needed = NEEDED.get(optimizer, {})
    made = optimizer(model, decay_groups(model, 0.3, layer_id=3), **needed)
    train(model, made, range(2))
    saved = through_a_file(made.state_dict())
    assert [group["weight_decay"] for group in saved["param_groups"]] == [0.3, 0.0]
    assert [group["layer_id"] for group in saved["param_groups"]] == [3, 3]
    other = net()
    again = optimizer(other, decay_groups(other, 0.1), **needed)
    again.load_state_dict(saved)
    other.load_state_dict(model.state_dict())
    assert decay_of(again) == decay_of(made)
    assert again.param_groups[0]["layer_id"] == 3
    for this, its in ((model, made), (other, again)):
        train(this, its, range(2, 4))
    assert same_bits(values(model), values(other))


# --- keys of other tools -------------------------------------------------------------------------


def test_keys_that_nobody_knows_pass_through_unread() -> None:
    model = net()
    more: dict[str, Any] = {"lr_scale": 0.5, "layer_id": 3, "group_name": "all", "fused": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = Muon(model, decay_groups(model, 0.1, **more))
    for group in optimizer.param_groups:
        assert {key: group[key] for key in more} == more
    lr = {b.hyperparameters["lr"] for b in optimizer.buckets}
    assert lr == {3e-4}
    saved = through_a_file(optimizer.state_dict())
    assert saved["param_groups"][1]["layer_id"] == 3
    assert "scale_mode" not in optimizer.param_groups[0]


@pytest.mark.parametrize(
    ("key", "meant"),
    [("weight_decya", "weight_decay"), ("momentun", "momentum"), ("Structures", "structures")],
)
def test_misspelt_keys_warn_once(key: str, meant: str) -> None:
    model = net()
    first, *rest = model.parameters()
    with pytest.warns(UserWarning, match=rf"Muon does not read the keys '{key}' \(for '{meant}'\?"):
        optimizer = Muon(model, [{"params": [first], key: 0.5}])
    optimizer.add_param_group({"params": rest, key: 0.5})
    assert optimizer.param_groups[1][key] == 0.5


@pytest.mark.parametrize(
    "key",
    [
        "betas",  # of other strategies
        "soap_betas",
        "alpha1",
        "nesterov",  # of the constructor
        "rounding",
        "routes",
        "adamw_lr",
        "adamw_moment",  # of a strategy by its prefix
        "muon_momentum",
    ],
)
def test_keys_that_mean_something_elsewhere_stay_an_error(key: str) -> None:
    model = net()
    with pytest.raises(HyperparameterError, match=rf"Unknown keys \['{key}'\] in a param group of"):
        Muon(model, [{"params": model.parameters(), key: 0.5}])


# --- no_decay ------------------------------------------------------------------------------------


@every_optimizer
def test_no_decay_leaves_out_roles_and_leaves_groups_as_given(optimizer: Any) -> None:
    model = net()
    groups = [
        {"params": [p for n, p in model.named_parameters() if n.startswith(part)]}
        for part in ("conv", ("embedding", "norm", "hidden", "head"))
    ]
    given = [[id(p) for p in group["params"]] for group in groups]
    needed: dict[str, Any] = NEEDED.get(optimizer, {})
    needed |= {} if optimizer is SIRFShampoo else {"weight_decay": 0.2}
    made = optimizer(model, groups, no_decay=("norm", "bias", "conv1.w*"), **needed)
    assert [[id(p) for p in group["params"]] for group in made.param_groups] == given
    found = decay_of(made)
    left_out = {name for name, decay in found.items() if decay == 0.0}
    if optimizer is SIRFShampoo:
        made.param_groups[0]["kappa"] = made.param_groups[1]["kappa"] = 0.2
        left_out = {name for name, decay in decay_of(made).items() if decay == 0.0}
    assert left_out == VECTORS | {"conv1.weight"}
    assert made.param_groups[0]["no_decay"] == ("norm", "bias", "conv1.w*")


def test_no_decay_trains_as_groups_that_were_split() -> None:
    model, twin = net(), net()
    optimizer = SOAP(model, lr=0.01, weight_decay=0.5, routes="adamw", no_decay=("norm", "bias"))
    split = SOAP(twin, decay_groups(twin, 0.5), lr=0.01, weight_decay=0.5, routes="adamw")
    train(model, optimizer, range(5))
    train(twin, split, range(5))
    assert same_bits(values(model), values(twin))
    decaying = net()
    train(decaying, SOAP(decaying, lr=0.01, weight_decay=0.5, routes="adamw"), range(5))
    assert not torch.equal(decaying.head.bias, model.head.bias)


def test_describe_shows_the_decay_where_it_differs() -> None:
    optimizer = AdamW(net(), weight_decay=0.25, no_decay="bias")
    shown = describe(optimizer)
    lines = [line.split() for line in str(shown).splitlines()]
    assert lines[0] == [
        "group", "parameters", "decay", "role", "rule", "shape", "rows", "structures", "state",
    ]  # fmt: skip
    decay = {line[1]: line[2] for line in lines[2:-2] if "(+" not in line[2]}
    assert decay["hidden.weight"] == "0.25"
    assert decay["hidden.bias"] == "0"
    assert {row.decays for row in shown.rows} == {True, False}
    assert {row.weight_decay for row in shown.rows if not row.decays} == {0.0}
    assert "decay" not in str(describe(AdamW(net()))).split()
    assert "decay" in str(describe(Muon(net(), adamw_weight_decay=0.5))).split()


def test_no_decay_is_saved_and_compared() -> None:
    def make(model: nn.Module, **given: Any) -> SOAP:
        return SOAP(model, lr=0.01, weight_decay=0.5, **given)

    model, resumed = net(), net()
    optimizer = make(model, no_decay=["norm", "bias"])
    train(model, optimizer, range(3))
    weights, state = through_a_file([model.state_dict(), optimizer.state_dict()])
    assert state["param_groups"][0]["no_decay"] == ("norm", "bias")
    again = make(resumed, no_decay=("norm", "bias"))
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    for this, its in ((model, optimizer), (resumed, again)):
        train(this, its, range(3, 6))
    assert same_bits(values(model), values(resumed))
    with pytest.raises(
        CheckpointError, match=r"no_decay is \('norm', 'bias'\) in the checkpoint, \("
    ):
        make(net()).load_state_dict(state)
    # checkpoints from before have no such key
    plain = make(net()).state_dict()
    del plain["param_groups"][0]["no_decay"]
    make(net()).load_state_dict(plain)
    with pytest.raises(CheckpointError, match="no_decay"):
        make(net(), no_decay="bias").load_state_dict(plain)


def test_a_group_may_have_a_no_decay_of_its_own() -> None:
    model = net()
    groups = [
        {"params": [*model.conv1.parameters(), *model.norm.parameters()], "no_decay": ()},
        {"params": [*model.hidden.parameters(), *model.head.parameters()]},
        {"params": model.conv2.parameters(), "no_decay": ["conv2.*"]},
    ]
    found = decay_of(AdamW(model, groups, weight_decay=0.1, no_decay="*.bias"))
    assert {name for name, decay in found.items() if decay == 0.0} == {
        "hidden.bias", "head.bias", "conv2.weight", "conv2.bias"
    }  # fmt: skip
    with pytest.raises(GroupError, match=r"no_decay has 'conv1\.\*', which match no parameter"):
        AdamW(model, [{"params": model.conv2.parameters(), "no_decay": ("conv1.*",)}])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, StructPrecondError, r"no_decay takes roles and patterns.*got 3"),
        ({"bias": 0.0}, StructPrecondError, r"no_decay takes roles and patterns"),
        ((nn.LayerNorm,), StructPrecondError, r"no_decay takes roles and patterns"),
        (("norms",), GroupError, r"no_decay has 'norms', which match no.*roles \(embedding"),
        (("norm", "*.scale"), GroupError, r"no_decay has '\*\.scale', which match no"),
    ],
)
def test_what_is_no_rule_is_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdamW(net(), no_decay=given)
    AdamW(net(), no_decay=("experts", "bias"))  # a role may be absent


def test_roles_without_a_model_warn_and_names_do_not() -> None:
    model = net()
    with pytest.warns(
        UserWarning, match="no_decay goes by roles, but AdamW was given parameters w"
    ):
        AdamW(model.parameters(), no_decay=("norm", "bias"))
    named = AdamW(model.named_parameters(), weight_decay=0.1, no_decay=("norm", "bias"))
    assert {name for name, decay in decay_of(named).items() if decay == 0.0} == VECTORS
    AdamW(list(model.parameters()), no_decay=("*'params'*",))


def test_a_unit_decays_as_a_whole() -> None:
    rules = (LinearWeightBias(), PerParameter())
    with pytest.raises(GroupError, match=r"leaves out a part of hidden\.weight \+ hidden\.bias"):
        SOAP(net(), combine_params=rules, no_decay="bias")
    optimizer = SOAP(net(), combine_params=rules, no_decay=("hidden.*", "norm"))
    found = decay_of(optimizer)
    assert found["hidden.weight + hidden.bias"] == 0.0
    assert found["head.weight + head.bias"] == 0.01
