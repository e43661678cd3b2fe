"""Routers, and gates that are no routers."""

from __future__ import annotations

import pytest
from torch import nn

from structprecond import Muon, NorMuon, Scion, describe
from tests.roles.helpers import HEAD, LINEAR, Bag, at, check, param

ROUTER = {"weight": "router", "bias": "bias"}
PLAIN = {"weight": "matrix"}


def swiglu() -> nn.Module:
    return Bag(gate=nn.Linear(4, 8, bias=False), up=nn.Linear(4, 8, bias=False),
               down=nn.Linear(8, 4, bias=False))  # fmt: skip


SWIGLU = at("", gate=PLAIN, up=PLAIN, down=PLAIN)


def moe(rows: int = 3, **more: nn.Module) -> nn.Module:
    experts = nn.ModuleList([swiglu() for _ in range(3)])
    return Bag(gate=nn.Linear(4, rows, bias=False), experts=experts, **more)


EXPERTS = at("experts.0", "experts.1", "experts.2", **{"": SWIGLU})


def test_gate_with_a_row_per_expert():
    roles = check(moe(), {"gate.weight": "router"} | EXPERTS)
    assert roles["gate.weight"].reason == "named gate, with one row per expert"
    # another number of rows: no gate of these experts
    check(moe(rows=8), {"gate.weight": "matrix"} | EXPERTS)


def test_shared_expert():
    """As in Qwen2-MoE: it has a gate of one row."""
    model = moe(shared_expert=swiglu(), shared_expert_gate=nn.Linear(4, 1, bias=False))
    expected = at("shared_expert", **{"": SWIGLU}) | {"shared_expert_gate.weight": "router"}
    check(model, {"gate.weight": "router"} | EXPERTS | expected)


@pytest.mark.parametrize("gate", ["gate", "gate_proj", "w_gate"])
@pytest.mark.parametrize("width", [3, 8])
def test_gate_of_an_mlp_is_a_matrix(gate: str, width: int):
    mlp = Bag(**{gate: nn.Linear(4, width)}, up=nn.Linear(4, width), down=nn.Linear(width, 4))
    expected = at("mlp", **{gate: LINEAR}, up=LINEAR, down=LINEAR)
    check(Bag(mlp=mlp, head=nn.Linear(4, 2)), expected | at("", head=HEAD))
    # also inside an expert, even with as many features as experts
    experts = Bag(experts=nn.ModuleList([mlp, *[swiglu() for _ in range(width - 1)]]))
    inside = {n.replace("mlp", "experts.0"): r for n, r in expected.items()}
    others = at(*(f"experts.{i}" for i in range(1, width)), **{"": SWIGLU})
    check(experts, inside | others)


def test_gate_beside_experts_in_one_parameter():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = param(3, 4, 8), param(3, 8, 4)

    experts = {"experts.up": "experts", "experts.down": "experts"}
    check(Bag(gate=nn.Linear(4, 3), experts=Experts()), at("", gate=ROUTER) | experts)
    check(Bag(gate=nn.Linear(4, 5), experts=Experts()), at("", gate=LINEAR) | experts)
    # outside a linear layer, it may be transposed
    check(Bag(wg=param(4, 3), experts=Experts()), {"wg": "router"} | experts)
    check(Bag(wg=param(4, 4), experts=Experts()), {"wg": "matrix"} | experts)
    gate = Bag(wg=nn.Linear(4, 3))
    check(Bag(gate=gate, experts=Experts()), at("gate", wg=ROUTER) | experts)


def test_gate_with_several_layers_and_several_gates():
    """As in a multi-task mixture of experts."""
    experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    gates = nn.ModuleList([nn.Linear(4, 3) for _ in range(2)])
    inside = at("experts", **{"0": LINEAR, "1": LINEAR, "2": LINEAR})
    check(Bag(experts=experts, gates=gates), inside | at("gates", **{"0": ROUTER, "1": ROUTER}))
    deep = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    check(Bag(experts=experts, gate=deep), inside | at("gate", **{"0": LINEAR, "2": ROUTER}))


def test_routers_are_known_by_their_names():
    """As in the Switch Transformer, whose router has a classifier."""

    class TopKRouter(Bag):
        pass

    model = Bag(router=Bag(classifier=nn.Linear(4, 3)), up=nn.Linear(4, 5))
    check(model, at("router", classifier=ROUTER) | at("", up=HEAD))
    model = Bag(choose=TopKRouter(weight=param(3, 4)), up=nn.Linear(4, 5))
    roles = check(model, {"choose.weight": "router"} | at("", up=HEAD))
    assert roles["choose.weight"].reason == "weight of the router choose"
    roles = check(Bag(router_weight=param(3, 4), up=nn.Linear(4, 5)),
                  {"router_weight": "router"} | at("", up=HEAD))  # fmt: skip
    assert roles["router_weight"].reason == "named router_weight"
    assert check(TopKRouter(weight=param(3, 4)), {"weight": "router"})


@pytest.mark.parametrize("make", [Muon, NorMuon])
def test_goes_to_adamw(make: type[Muon]):
    optimizer = make(moe(lm_head=nn.Linear(4, 9)))
    strategies = {name: row.strategy for row in describe(optimizer).rows for name in row.names}
    assert strategies["gate.weight"] == "AdamWStrategy"
    assert strategies["experts.0.gate.weight"] == f"{make.__name__}Strategy"
    routed = make(moe(lm_head=nn.Linear(4, 9)), routes={"router": make.__name__.lower()})
    strategies = {name: row.strategy for row in describe(routed).rows for name in row.names}
    assert strategies["gate.weight"] == f"{make.__name__}Strategy"


def test_is_a_matrix_to_scion():
    norms = {u.label: vars(b.strategy)["norm"] for b in Scion(moe()).buckets for u in b.units}
    assert norms["gate.weight"] == "spectral"
