"""Depthwise convolutions."""

from __future__ import annotations

import pytest
from torch import nn

from structprecond import Muon, NorMuon, Scion, describe
from tests.roles.helpers import CONV, HEAD, NORM, Bag, at, check, param

DEPTHWISE = {"weight": "depthwise", "bias": "bias"}


def separable() -> nn.Module:
    """As in MobileNet."""
    return Bag(depthwise=nn.Conv2d(4, 4, 3, groups=4), bn=nn.BatchNorm2d(4),
               pointwise=nn.Conv2d(4, 8, 1, bias=False), head=nn.Linear(8, 2))  # fmt: skip


def test_separable_convolution():
    roles = check(separable(), at("", depthwise=DEPTHWISE, bn=NORM, pointwise=CONV, head=HEAD))
    assert roles["depthwise.weight"].reason == "weight of Conv2d, with a group per channel"


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_group_per_channel(layer: type[nn.Conv2d]):
    last = {"last": nn.Linear(4, 2)}
    for outputs in (4, 8):
        check(Bag(conv=layer(4, outputs, 3, groups=4), **last), at("", conv=DEPTHWISE, last=HEAD))
    grouped = at("", conv=CONV | {"bias": "bias"}, last=HEAD)
    check(Bag(conv=layer(4, 4, 3, groups=2), **last), grouped)
    # one channel is the whole picture, not a depthwise convolution
    check(Bag(conv=layer(1, 4, 3), **last), grouped)


def test_is_no_output():
    """A depthwise convolution is no output layer, by its name or its place."""
    check(Bag(body=nn.Conv2d(3, 4, 3, bias=False), head=nn.Conv2d(4, 4, 1, groups=4)),
          at("", body=CONV, head=DEPTHWISE))  # fmt: skip


def test_custom_layers():
    class DepthwiseConv(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.weight = param(*shape)

    model = nn.Sequential(DepthwiseConv(4, 1, 3, 3), DepthwiseConv(4, 2, 3, 3), nn.Linear(4, 2))
    expected = {"0.weight": "depthwise", "1.weight": "conv", "2.weight": "head", "2.bias": "bias"}
    check(model, expected)
    check(Bag(conv=param(4, 1, 3, 3)), {"conv": "conv"})


@pytest.mark.parametrize("make", [Muon, NorMuon])
def test_goes_to_adamw(make: type[Muon]):
    strategies = {
        name: row.strategy for row in describe(make(separable())).rows for name in row.names
    }
    assert strategies["depthwise.weight"] == "AdamWStrategy"
    assert strategies["pointwise.weight"] == f"{make.__name__}Strategy"


def test_is_a_vector_to_scion():
    norms = {u.label: vars(b.strategy)["norm"] for b in Scion(separable()).buckets for u in b.units}
    assert norms["depthwise.weight"] == "rms"
    assert norms["pointwise.weight"] == "spectral"
