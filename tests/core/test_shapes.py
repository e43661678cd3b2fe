"""Parameters of unusual shapes, empty ones and tied ones train like any others."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import (
    FlattenEmbedding,
    LinearWeightBias,
    PerParameter,
    PreconditionerGroup,
    SIRFShampoo,
)
from tests.helpers import (
    SETTINGS,
    DenseUnit,
    assert_close,
    linear_unit,
    set_grads,
    values,
)


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
    assert optimizer.state[model.scalar]["preconditioner.0.diag"].shape == (1,)
    assert not [name for name in optimizer.state[model.row] if name.startswith("preconditioner.1")]
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
