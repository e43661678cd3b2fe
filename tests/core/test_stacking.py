"""Stacked units train as if each had its own optimizer."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Size, Tensor, nn

from structprecond import (
    LinearWeightBias,
    PerParameter,
    PreconditionerGroup,
    SIRFShampoo,
    SplitHeads,
)
from tests.helpers import (
    SETTINGS,
    assert_close,
    mlp,
    same_bits,
    set_grads,
    values,
)


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
