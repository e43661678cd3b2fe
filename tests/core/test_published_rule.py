"""Training follows SIRF-Shampoo as published, however units are stacked."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from structprecond import (
    FlattenEmbedding,
    LinearWeightBias,
    PerParameter,
    PreconditionerGroup,
    SIRFShampoo,
    SplitHeads,
)
from tests.helpers import (
    SETTINGS,
    DenseUnit,
    assert_close,
    backward,
    dense_units,
    linear_unit,
    mlp,
    train,
    values,
)

# --- shapes and dtypes ---------------------------------------------------------------------------


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
