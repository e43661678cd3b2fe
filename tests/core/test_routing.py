"""One optimizer that routes each parameter to a strategy by its role or name."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from structprecond import (
    SAM,
    SOAP,
    AdamWStrategy,
    GroupError,
    KLShampooStrategy,
    LARSStrategy,
    LinearWeightBias,
    Matricize,
    Muon,
    MuonStrategy,
    PerParameter,
    Scion,
    ShampooStrategy,
    SIRFShampooStrategy,
    SOAPStrategy,
    StackExperts,
    StructPrecondError,
    StructuredOptimizer,
    describe,
    infer_roles,
)
from structprecond.core.strategy_names import name_of
from structprecond.roles import infer
from tests.core.routed import MIXED, mixed, net, routes_of, train, warns_of_roles
from tests.helpers import same_bits, through_a_file, values


def test_every_parameter_goes_where_its_role_says() -> None:
    assert routes_of(mixed(net())) == {
        "embedding.weight": ("adamw", "embedding"),
        "conv1.weight": ("soap", "conv"),
        "conv1.bias": ("adamw", "bias"),
        "conv2.weight": ("soap", "conv"),
        "conv2.bias": ("adamw", "bias"),
        "norm.weight": ("adamw", "norm"),
        "norm.bias": ("adamw", "norm"),
        "hidden.weight": ("muon", "matrix"),
        "hidden.bias": ("adamw", "bias"),
        "head.weight": ("adamw", "head"),
        "head.bias": ("adamw", "bias"),
    }


def test_each_part_is_as_an_optimizer_of_its_own() -> None:
    model = net().double()
    other = copy.deepcopy(model)
    optimizer = StructuredOptimizer(
        model,
        strategy=MIXED,
        hyperparameters={
            "lr": 0.02,
            "betas": (0.8, 0.9),
            "weight_decay": 0.2,
            "muon_momentum": 0.7,
            "muon_lr_scale": 0.1,
            "muon_weight_decay": 0.3,
            "soap_precondition_frequency": 2,
            "soap_lr_scale": 2.0,
            "soap_betas": (0.6, 0.7),
        },
    )
    elsewhere = {"conv1.weight", "conv2.weight", "hidden.weight"}
    rest = [p for name, p in other.named_parameters() if name not in elsewhere]
    parts: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            rest,
            lr=0.02,
            betas=(0.8, 0.9),
            weight_decay=0.2,
        ),
        Muon([("hidden.weight", other.hidden.weight)], lr=0.002, momentum=0.7, weight_decay=0.3),
        SOAP(
            [other.conv1.weight, other.conv2.weight],
            lr=0.04,
            betas=(0.6, 0.7),
            weight_decay=0.2,
            precondition_frequency=2,
        ),
    ]
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            q.grad = p.grad.clone()
        optimizer.step()
        for part in parts:
            part.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-11), name


def test_mixed_optimizer_trains_and_resumes_to_the_bit() -> None:
    model = net()
    optimizer = mixed(model)
    losses = train(model, optimizer, range(150))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    weights, state = through_a_file([model.state_dict(), optimizer.state_dict()])
    resumed = net()
    again = mixed(resumed)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    train(model, optimizer, range(150, 170))
    train(resumed, again, range(150, 170))
    assert same_bits(values(model), values(resumed))


def test_schedulers_see_one_lr_per_group_as_given() -> None:
    model = net()
    groups: list[dict[str, Any]] = [
        {"params": [*model.embedding.parameters(), *model.conv1.parameters()], "lr": 0.3},
        {"params": [p for m in (model.conv2, model.hidden) for p in m.parameters()]},
        {"params": [*model.norm.parameters(), *model.head.parameters()], "lr": 0.1},
    ]
    optimizer = mixed(model, params=groups)
    given = [[id(p) for p in group["params"]] for group in groups]
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == given
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    assert schedule.get_last_lr() == [0.3, 0.01, 0.1]
    train(model, optimizer, range(1))
    schedule.step()
    assert schedule.get_last_lr() == [0.15, 0.005, 0.05]
    halves = {name_of(b.strategy): b.hyperparameters["lr"] for b in optimizer.buckets}
    assert halves["muon"] == 0.0025


def test_patterns_go_before_roles() -> None:
    rules: Any = {"conv2.*": MuonStrategy(), "conv": SOAPStrategy(), "default": AdamWStrategy()}
    routes = routes_of(StructuredOptimizer(net(), strategy=rules))
    assert routes["conv1.weight"] == ("soap", "conv")
    assert routes["conv2.weight"] == ("muon", "conv2.*")
    assert routes["conv2.bias"] == ("muon", "conv2.*")
    assert routes["conv1.bias"] == ("adamw", "bias")


def test_muon_is_overridden_by_role_by_name_and_by_param_group() -> None:
    model = net()
    routes = routes_of(
        Muon(model, routes={"head": "muon", "conv1.weight": "adamw", "embedding": LARSStrategy()})
    )
    assert routes["head.weight"] == ("muon", "head")
    assert routes["conv1.weight"] == ("adamw", "conv1.weight")
    assert routes["conv2.weight"] == ("muon", "conv")
    assert routes["embedding.weight"] == ("lars", "embedding")
    optimizer = Muon(
        model,
        [
            {"params": model.head.parameters(), "strategy": MuonStrategy(scale_mode="spectral")},
            {"params": [*model.conv1.parameters(), *model.hidden.parameters()], "lr": 0.5},
            {"params": model.embedding.parameters(), "strategy": AdamWStrategy(), "eps": 1e-4},
        ],
        adamw_eps=1e-6,
    )
    routes = routes_of(optimizer)
    assert routes["head.bias"][0] == "muon"
    assert routes["hidden.bias"] == ("adamw", "bias")
    assert routes["hidden.weight"] == ("muon", "matrix")
    eps = {b.units[0].label: b.hyperparameters.get("eps") for b in optimizer.buckets}
    assert eps["embedding.weight"] == 1e-4
    assert eps["hidden.bias"] == 1e-6


def test_grouping_rules_come_first_and_the_first_parameter_decides() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    rules = (LinearWeightBias(), PerParameter())
    optimizer = StructuredOptimizer(
        model,
        strategy={"head": AdamWStrategy(), "default": SOAPStrategy()},
        combine_params=rules,
    )
    assert routes_of(optimizer) == {
        "0.weight + 0.bias": ("soap", "matrix"),
        "2.weight + 2.bias": ("adamw", "head"),
    }
    with pytest.raises(GroupError, match=r"'0\.bias' matches a parameter of 0\.weight \+ 0\.b"):
        StructuredOptimizer(
            model,
            strategy={"0.bias": AdamWStrategy(), "default": SOAPStrategy()},
            combine_params=rules,
        )


def test_bare_parameters_are_routed_by_shape() -> None:
    shapes: list[tuple[int, ...]] = [(4, 3), (3,), (2, 3, 3, 3), ()]
    with pytest.warns(UserWarning, match="The roles of the 2 with two axes or more were guessed"):
        optimizer = Muon([nn.Parameter(torch.randn(shape)) for shape in shapes])
    names = [name for name, _ in routes_of(optimizer).values()]
    assert sorted(names) == ["adamw", "adamw", "muon", "muon"]
    assert routes_of(optimizer)["param_groups[0]['params'][2]"] == ("muon", "conv")


def test_two_configurations_of_one_strategy_share_hyperparameters() -> None:
    strategies: Any = {"conv": SOAPStrategy(max_precond_dim=4), "default": SOAPStrategy()}
    optimizer = StructuredOptimizer(
        net(), strategy=strategies, hyperparameters={"lr": 0.1, "eps": 1e-5}
    )
    assert not [name for name in optimizer.param_groups[0] if name.startswith("soap_")]
    assert {bucket.hyperparameters["eps"] for bucket in optimizer.buckets} == {1e-5}
    configured = {b.units[0].label: b.strategy.max_precond_dim for b in optimizer.buckets}  # type: ignore[attr-defined]
    assert configured["conv1.weight"] == 4
    assert configured["hidden.weight"] == 10000


def test_refreshes_keep_their_own_intervals() -> None:
    asked: list[int] = []

    def never(step: int) -> bool:
        asked.append(step)
        return False

    model = net()
    strategies: Any = {
        "conv": ShampooStrategy(),
        "matrix": KLShampooStrategy(),
        "default": SIRFShampooStrategy(),
    }
    optimizer = StructuredOptimizer(
        model,
        strategy=strategies,
        batch_size=32,
        hyperparameters={
            "klshampoo_precondition_frequency": never,
            "shampoo_precondition_frequency": 2,
        },
    )
    train(model, optimizer, range(4))
    assert asked == [0, 1, 2, 3]


def test_groups_name_a_strategy_of_the_optimizer_and_share_its_settings() -> None:
    model = net()
    optimizer = Muon(
        model,
        [
            {"params": [*model.conv1.parameters(), *model.conv2.parameters()], "strategy": "muon"},
            {"params": model.hidden.parameters(), "strategy": "adamw", "adamw_eps": 1e-3},
            {"params": [*model.embedding.parameters(), *model.head.parameters()]},
        ],
        scale_mode="match_rms_adamw",
        adamw_betas=(0.5, 0.6),
        adamw_lr=0.1,
        lr=0.2,
    )
    routes = routes_of(optimizer)
    assert {routes[f"conv1.{name}"][0] for name in ("weight", "bias")} == {"muon"}
    assert {routes[f"hidden.{name}"][0] for name in ("weight", "bias")} == {"adamw"}
    assert routes["head.weight"] == ("adamw", "head")
    for bucket in optimizer.buckets:
        if name_of(bucket.strategy) == "muon":
            assert bucket.strategy.scale_mode == "match_rms_adamw"  # type: ignore[attr-defined]
        else:
            assert bucket.hyperparameters["betas"] == (0.5, 0.6)
            assert bucket.hyperparameters["lr"] == 0.1
    eps = {b.units[0].label: b.hyperparameters.get("eps") for b in optimizer.buckets}
    assert eps["hidden.weight"] == 1e-3
    copied = copy.deepcopy(optimizer)
    copied.load_state_dict(optimizer.state_dict())
    with pytest.raises(StructPrecondError, match="strategy is 'sgd', expected one of 'muon'"):
        Muon(model, [{"params": model.head.parameters(), "strategy": "sgd"}])


def test_experts_stay_apart_under_every_way_to_muon() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(3, 6, 4))
            self.b1 = nn.Parameter(torch.randn(3, 6))

    model = nn.ModuleDict({"experts": Experts(), "head": nn.Linear(4, 2)})
    weight = next(model.parameters())
    ways = [
        Muon(model),
        Muon(model, [{"params": [weight], "strategy": "muon"}]),
        Muon(model, [{"params": [weight], "strategy": MuonStrategy()}]),
        StructuredOptimizer(model, [weight], strategy=MuonStrategy()),
        Muon(model, combine_params=MuonStrategy.combine_params),
    ]
    for optimizer in ways:
        assert optimizer.buckets[0].shape == (3, 6, 4)
    assert routes_of(ways[0])["experts.b1"] == ("adamw", "bias")


def test_heads_in_one_weight_are_a_stack_by_pattern() -> None:
    model = nn.ParameterDict({"W_Q": torch.randn(4, 8, 2), "W_O": torch.randn(8, 8)})
    optimizer = Muon(
        model,
        routes={"W_Q": "muon"},
        combine_params=(StackExperts("W_Q"), *MuonStrategy.combine_params),
    )
    assert {bucket.shape for bucket in optimizer.buckets} == {(4, 8, 2), (1, 8, 8)}
    with pytest.raises(GroupError, match=r"expected parameters with at least two axes, found \{\}"):
        Muon(model, combine_params=(StackExperts("*.W_Q"), Matricize()))


def test_wrappers_do_not_change_names() -> None:
    model = net()
    plain = Muon(model)
    train(model, plain, range(3))
    compiled = torch.compile(model, backend="eager")
    wrapped = Muon(compiled, routes=None)  # type: ignore[arg-type]
    assert wrapped.param_groups[0]["param_names"] == plain.param_groups[0]["param_names"]
    wrapped.load_state_dict(plain.state_dict())
    assert routes_of(wrapped) == routes_of(plain)
    inside = net()
    inside.hidden = torch.compile(inside.hidden, backend="eager")  # type: ignore[assignment]
    assert routes_of(Muon(inside)) == routes_of(plain)
    assert routes_of(Muon(nn.DataParallel(net()))) == routes_of(plain)


def test_plain_tensors_and_named_parameters_are_routed() -> None:
    tensor = torch.randn(3, 4, requires_grad=True)
    with warns_of_roles():
        optimizer = Muon([tensor])
    tensor.grad = torch.randn_like(tensor)
    before = tensor.detach().clone()
    optimizer.step()
    assert not torch.equal(tensor, before)
    named = {"wte.weight": (9, 4), "h.0.fc.weight": (8, 4), "lm_head.weight": (9, 4)}
    params = [(name, nn.Parameter(torch.randn(shape))) for name, shape in named.items()]
    assert {n: r[0] for n, r in routes_of(Muon(params)).items()} == {
        "wte.weight": "adamw",
        "h.0.fc.weight": "muon",
        "lm_head.weight": "adamw",
    }


def test_many_groups_are_built_in_linear_time() -> None:
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(150))
    calls = []
    original = infer._find_roles
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer, "_find_roles", lambda m: calls.append(m) or original(m))  # type: ignore[func-returns-value]
        Muon(model, [{"params": [p]} for p in model.parameters()])
    assert len(calls) == 1
    # but roles of a changed model are inferred again
    model.append(nn.Linear(2, 2))
    assert len(infer_roles(model)) == 302


def test_describe_takes_a_sam_and_shows_routes_of_one_class() -> None:
    shown = str(describe(SAM(None, Scion(net()))))
    assert shown.split()[:4] == ["group", "parameters", "strategy", "role"]
    with pytest.raises(StructPrecondError, match="describe takes an optimizer of this library"):
        describe(torch.optim.SGD(net().parameters(), lr=0.1))


def test_tied_heads_are_not_for_muon() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(9, 4)
            self.hidden = nn.Linear(4, 4, bias=False)
            self.lm_head = nn.Linear(4, 9, bias=False)
            self.lm_head.weight = self.wte.weight

    assert routes_of(Muon(Tied())) == {
        "wte.weight": ("adamw", "head"),
        "hidden.weight": ("muon", "matrix"),
    }


def test_the_table_says_what_went_where(capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = Muon(net(), verbose_init=True)
    shown = capsys.readouterr().out
    assert str(describe(optimizer)) in shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["hidden.weight", "MuonStrategy", "matrix"] in [line[1:4] for line in lines]
    assert ["head.weight", "AdamWStrategy", "head"] in [line[1:4] for line in lines]
    rows: Sequence[Any] = describe(optimizer).rows
    assert {row.strategy for row in rows} == {"MuonStrategy", "AdamWStrategy"}
