"""`routes=` means the same on every optimizer, and names stand for strategies."""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from structprecond import (
    LARS,
    SOAP,
    AdamW,
    AdamWStrategy,
    CheckpointError,
    GroupError,
    LARSStrategy,
    Muon,
    MuonStrategy,
    Scion,
    SIRFShampoo,
    SOAPStrategy,
    StructPrecondError,
    StructuredOptimizer,
)
from structprecond.core.strategy_names import known_strategies, name_of
from tests.core.routed import Net, net, routes_of, train
from tests.every_strategy import OPTIMIZERS, strategy_of
from tests.helpers import PlainDescent, same_bits, through_a_file, values

NEEDED: dict[Any, dict[str, Any]] = {LARS: {"lr": 0.1}, SIRFShampoo: {"batch_size": 32}}
MATRICES = ["conv1.weight", "conv2.weight", "hidden.weight"]
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def strategies_of(optimizer: StructuredOptimizer) -> dict[str, str]:
    """Return the name of the strategy of every unit."""
    return {label: strategy for label, (strategy, _) in routes_of(optimizer).items()}


def grads_for(*models: nn.Module, seed: int) -> None:
    """Give models the same random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for group in zip(*(model.parameters() for model in models), strict=True):
        grad = torch.randn(group[0].shape, generator=generator, dtype=group[0].dtype)
        for p in group:
            p.grad = grad.clone()


# --- every optimizer -----------------------------------------------------------------------------


@every_optimizer
def test_a_dict_routes_by_role_and_by_name(optimizer: Any) -> None:
    routes = {"embedding": "lars", "conv1.*": AdamWStrategy(), "head": "klsoap"}
    needed = NEEDED.get(optimizer, {})
    made = optimizer(net(), routes=routes, **needed)
    usual = strategies_of(optimizer(net(), **needed))
    assert strategies_of(made) == usual | {
        "embedding.weight": "lars",
        "conv1.weight": "adamw",
        "conv1.bias": "adamw",
        "head.weight": "klsoap",
    }
    model = made.model
    before = values(model)
    train(model, made, range(2))
    moved = [not same_bits(a, b) for a, b in zip(before, values(model), strict=True)]
    assert all(moved)


@every_optimizer
def test_a_name_alone_is_for_all_that_is_no_matrix(optimizer: Any) -> None:
    made = optimizer(net(), routes="adamw", **NEEDED.get(optimizer, {}))
    own = name_of(strategy_of(optimizer))
    found = strategies_of(made)
    assert [name for name, strategy in found.items() if strategy == own] == (
        list(found) if own == "adamw" else MATRICES
    )
    assert {strategy for name, strategy in found.items() if name not in MATRICES} == {"adamw"}


@every_optimizer
def test_routes_have_to_match_and_checkpoints_to_agree(optimizer: Any) -> None:
    needed = NEEDED.get(optimizer, {})
    with pytest.raises(GroupError, match=r"'experts' match no parameter"):
        optimizer(net(), routes={"experts": "adamw"}, **needed)
    saved = optimizer(net(), routes={"head": "lars"}, **needed).state_dict()
    with pytest.raises(CheckpointError, match="strategy is"):
        optimizer(net(), **needed).load_state_dict(saved)


def test_the_short_form_is_as_two_optimizers() -> None:
    model = net().double()
    twin = copy.deepcopy(model)
    both = SOAP(model, lr=0.02, weight_decay=0.01, precondition_frequency=2, routes="adamw")
    matrices = [p for name, p in twin.named_parameters() if name in MATRICES]
    rest = [p for name, p in twin.named_parameters() if name not in MATRICES]
    soap = SOAP(matrices, lr=0.02, weight_decay=0.01, precondition_frequency=2)
    adamw = torch.optim.AdamW(rest, lr=0.02)
    for step in range(6):
        grads_for(model, twin, seed=step)
        for optimizer in (both, soap, adamw):
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-11), name


def test_routed_optimizer_resumes_to_the_bit() -> None:
    def make(model: nn.Module) -> SIRFShampoo:
        return SIRFShampoo(model, lr=0.01, routes={"conv": "soap", "embedding": "adamw"})

    model, resumed = net(), net()
    optimizer = make(model)
    train(model, optimizer, range(12))
    weights, state = through_a_file([model.state_dict(), optimizer.state_dict()])
    again = make(resumed)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    for this, its in ((model, optimizer), (resumed, again)):
        train(this, its, range(12, 16))
    assert same_bits(values(model), values(resumed))
    # the factors of those that have some
    assert len(again.preconditioner) == len(values(model)) - 3
    assert len(again.preconditioner_momenta) == len(again.preconditioner)


def test_routes_go_on_top_of_those_that_an_optimizer_has() -> None:
    routed = strategies_of(Scion(net(), routes="adamw"))
    assert [name for name, strategy in routed.items() if strategy == "scion"] == MATRICES
    by_role = Scion(net(), routes={"head": "scion", "embedding": LARSStrategy()})
    norms = {u.label: getattr(b.strategy, "norm", None) for b in by_role.buckets for u in b.units}
    assert norms["head.weight"] == norms["hidden.weight"] == "spectral"
    assert norms["embedding.weight"] is None
    assert norms["head.bias"] == "rms"
    rules: Any = {"embedding": "soap", "conv2.*": "lars", "default": "muon"}
    mixed = StructuredOptimizer(net(), strategy=rules, routes={"conv2.*": "klsoap"})
    assert strategies_of(mixed)["conv2.weight"] == "klsoap"
    # what has a route of its own keeps it
    mixed = StructuredOptimizer(net(), strategy=rules, routes="adamw")
    assert strategies_of(mixed)["embedding.weight"] == "soap"
    assert strategies_of(mixed)["conv2.bias"] == "lars"
    assert strategies_of(mixed)["head.weight"] == strategies_of(mixed)["hidden.bias"] == "adamw"


def test_hyperparameters_of_a_route_are_set_in_param_groups() -> None:
    model = net()
    vectors = [p for p in model.parameters() if p.ndim < 2]
    rest = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = SOAP(
        model,
        [
            {"params": rest, "adamw_betas": (0.5, 0.6), "adamw_lr_scale": 0.1, "betas": (0.8, 0.9)},
            {"params": vectors, "adamw_eps": 1e-3},
        ],
        lr=0.5,
        routes="adamw",
    )
    found = {u.label: b.hyperparameters for b in optimizer.buckets for u in b.units}
    assert found["head.weight"]["betas"] == (0.5, 0.6)
    assert found["head.weight"]["lr"] == 0.05
    assert found["hidden.weight"]["betas"] == (0.8, 0.9)
    assert found["hidden.weight"]["lr"] == 0.5
    assert found["head.bias"]["eps"] == 1e-3
    assert found["head.bias"]["betas"] == (0.9, 0.999)


# --- names ---------------------------------------------------------------------------------------


def test_names_stand_for_strategies_with_their_defaults() -> None:
    named = StructuredOptimizer(net(), strategy={"matrix": "muon", "default": "adamw"})
    given = StructuredOptimizer(
        net(), strategy={"matrix": MuonStrategy(), "default": AdamWStrategy()}
    )
    assert routes_of(named) == routes_of(given)
    for optimizer, other in ((named, given), (given, named)):
        other.load_state_dict(optimizer.state_dict())
    alone = StructuredOptimizer(net(), strategy="soap")
    assert {bucket.strategy for bucket in alone.buckets} == {SOAPStrategy()}


def test_every_strategy_of_the_library_has_a_name() -> None:
    known = known_strategies()
    for optimizer in OPTIMIZERS:
        strategy = strategy_of(optimizer)
        assert known[name_of(strategy)] == [strategy]
    assert "orthogonalizedmomentum" not in known  # has no update rule


def test_names_of_an_optimizers_own_strategies_stand_for_them() -> None:
    routes = {"head": "muon", "conv1.weight": "adamw", "embedding": "soap"}
    model = net()
    optimizer = Muon(model, routes=routes, scale_mode="match_rms_adamw", adamw_betas=(0.1, 0.2))
    buckets = {u.label: b for b in optimizer.buckets for u in b.units}
    assert buckets["head.weight"].strategy == MuonStrategy(scale_mode="match_rms_adamw")
    assert buckets["conv1.weight"].hyperparameters["betas"] == (0.1, 0.2)
    assert buckets["embedding.weight"].strategy == SOAPStrategy()


def test_param_groups_name_any_strategy() -> None:
    model = net()
    optimizer = Muon(
        model,
        [
            {"params": model.hidden.parameters(), "strategy": "soap", "shampoo_beta": 0.5},
            {
                "params": [*model.conv1.parameters(), *model.head.parameters()],
                "strategy": {"conv": "klsoap", "head": "muon", "default": "adamw"},
            },
            {"params": model.embedding.parameters()},
        ],
        scale_mode="match_rms_adamw",
    )
    found = strategies_of(optimizer)
    assert found["hidden.weight"] == found["hidden.bias"] == "soap"
    assert found["conv1.weight"] == "klsoap"
    assert found["conv1.bias"] == "adamw"
    head = next(b for b in optimizer.buckets if b.units[0].label == "head.weight")
    assert head.strategy == MuonStrategy(scale_mode="match_rms_adamw")
    assert optimizer.param_groups[0]["shampoo_beta"] == 0.5
    copied = copy.deepcopy(optimizer)
    copied.load_state_dict(optimizer.state_dict())
    assert routes_of(copied) == routes_of(optimizer)


def test_strategies_of_ones_own_have_names_too() -> None:
    @dataclass(frozen=True)
    class Downhill(PlainDescent):
        """A strategy of the user's."""

    assert strategies_of(SOAP(net(), routes={"bias": "downhill"}))["head.bias"] == "downhill"
    first = Downhill

    @dataclass(frozen=True)
    class Downhill(PlainDescent):  # type: ignore[no-redef]
        """The same cell of a notebook again."""

    assert first is not Downhill
    assert known_strategies()["downhill"] == [Downhill]
    other: Any = type("DownhillStrategy", (PlainDescent,), {})
    with pytest.raises(StructPrecondError, match=r"routes is 'downhill', but several.*Give the st"):
        SOAP(net(), routes="downhill")
    assert strategies_of(SOAP(net(), routes={"head": other()}))["head.weight"] == "downhill"


def test_what_a_name_cannot_stand_for_is_refused() -> None:
    @dataclass(frozen=True)
    class NeedsSteps(PlainDescent):
        """A strategy without defaults."""

        steps: int

    with pytest.raises(StructPrecondError, match=r"'needssteps', but NeedsSteps cannot be made w"):
        SOAP(net(), routes="needssteps")
    assert SOAP(net(), routes={"head": NeedsSteps(3)}).buckets
    two: Any = {"conv": SOAPStrategy(max_precond_dim=4), "matrix": SOAPStrategy()}
    model: Net = net()
    with pytest.raises(StructPrecondError, match=r"A param group's strategy is 'soap', but sever"):
        AdamW(model, [{"params": model.parameters(), "strategy": "soap"}], routes=two)


@pytest.fixture(autouse=True)
def _forget_classes() -> Any:
    """Let classes that a test defines go, and their names with them."""
    yield
    gc.collect()


# --- roles without a model -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        Muon,
        Scion,
        lambda params: SOAP(params, routes="adamw"),
    ],
)
def test_bare_matrices_warn_once_where_roles_decide(make: Any) -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7))
    message = (
        r"routes parameters by their roles.*roles of the 3 with.*Pass the model, as in \w+\(model\)"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        optimizer = make(model.parameters())
    assert [w.filename for w in caught] == [__file__]
    more = nn.Linear(4, 4)
    optimizer.add_param_group({"params": [more.weight]})
    vectors = [p for p in model.parameters() if p.ndim == 1]
    # nothing of these is in doubt
    for given in (model, vectors, model.named_parameters()):
        make(given)
    make([{"params": list(model.named_parameters())}])


def test_bare_parameters_give_no_warning_where_roles_do_not_decide() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    Muon([{"params": [weight], "strategy": "muon"}])
    Muon([weight], routes={"*": "muon"})
    SOAP([weight])
    AdamW([weight], routes="adamw")
    with pytest.warns(UserWarning, match="SOAP routes parameters by their roles"):
        SOAP([weight], routes={"matrix": "muon"})
