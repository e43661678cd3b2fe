"""`describe` shows the roles of every optimizer's parameters, with reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from structprecond import (
    LARS,
    SOAP,
    AdamW,
    LinearWeightBias,
    Muon,
    PerParameter,
    Scion,
    Shampoo,
    SOAPStrategy,
    StructuredOptimizer,
    describe,
)
from structprecond.core.report import Description


def lars(model: nn.Module) -> LARS:
    return LARS(model, lr=0.1)


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 9))


LAST = "output layer: last linear layer outside repeated blocks"
EXPECTED = {
    "0.weight": ("embedding", "weight of Embedding"),
    "1.weight": ("matrix", "weight of Linear"),
    "1.bias": ("bias", "bias of Linear"),
    "2.weight": ("norm", "weight of LayerNorm"),
    "2.bias": ("norm", "bias of LayerNorm"),
    "3.weight": ("head", LAST),
    "3.bias": ("bias", "bias of Linear"),
}


def roles(description: Description) -> dict[str, tuple[str, str]]:
    return {
        name: (role, reason)
        for row in description.rows
        for name, role, reason in zip(row.names, row.roles, row.reasons, strict=True)
    }


@pytest.mark.parametrize("make", [AdamW, SOAP, Shampoo, lars, Muon, Scion])
def test_every_optimizer_shows_roles(make: Any):
    description = describe(make(model()))
    assert roles(description) == EXPECTED
    header, _, *lines = str(description).splitlines()
    assert header.split()[:2] == ["group", "parameters"]
    assert "role" in header.split()
    column = header.index("role")
    assert {line[column:].split()[0].rstrip(",") for line in lines[:-2]} <= {
        role for role, _ in EXPECTED.values()
    }


def test_table_by_parameter():
    lines = describe(SOAP(model())).by_parameter().splitlines()
    assert lines[0].split() == ["parameters", "role", "strategy", "reason"]
    assert len(lines) == 2 + len(EXPECTED)
    assert ["3.weight", "head", "SOAPStrategy", *LAST.split()] in [line.split() for line in lines]


def test_routes_are_shown_where_a_name_decided():
    by_name = StructuredOptimizer(
        model(), strategy={"3.*": SOAPStrategy(), "default": SOAPStrategy(normalize_grads=True)}
    )
    assert str(describe(by_name)).split()[:5] == [
        "group",
        "parameters",
        "strategy",
        "route",
        "role",
    ]
    assert "route" not in str(describe(Muon(model()))).split()
    assert "route" not in str(describe(SOAP(model()))).split()


def test_units_have_the_role_of_their_first_parameter():
    rules = (LinearWeightBias(), PerParameter())
    description = describe(SOAP(model(), combine_params=rules))
    assert roles(description)["1.weight + 1.bias"] == EXPECTED["1.weight"]


def test_stacks_of_several_roles_and_bare_parameters():
    square = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    (row,) = describe(SOAP(square)).rows
    assert row.roles == ("matrix", "head")
    assert "matrix, head" in str(describe(SOAP(square)))
    bare = describe(SOAP(square.parameters()))
    assert bare.rows[0].roles == ("matrix", "matrix")


def test_models_with_lazy_layers():
    """Roles are not known before the first forward pass, but the rest is."""
    lazy = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2))
    description = describe(SOAP(lazy, lazy[0].parameters()))
    assert [row.roles for row in description.rows] == [(), ()]
    assert "0.weight" in str(description)
    assert "0.weight" in description.by_parameter()


def test_compiled_models():
    compiled: Any = torch.compile(model(), backend="eager")
    assert roles(describe(SOAP(compiled))) == EXPECTED
