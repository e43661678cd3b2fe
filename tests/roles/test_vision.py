"""Vision models as people write them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.roles.helpers import (
    ATTENTION,
    CONV,
    HEAD,
    LINEAR,
    NORM,
    Bag,
    Expected,
    at,
    check,
    param,
)


class Residual(nn.Module):
    """A block of torchvision's ResNet: basic for kernels (3, 3), a bottleneck for (1, 3, 1)."""

    def __init__(self, channels: list[int], kernels: tuple[int, ...], squeeze: bool) -> None:
        super().__init__()
        for i, kernel in enumerate(kernels):
            conv = nn.Conv2d(channels[i], channels[i + 1], kernel, bias=False)
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(channels[i + 1]))
        last = channels[-1]
        if squeeze:
            self.se = nn.Sequential(nn.Linear(last, 2), nn.ReLU(), nn.Linear(2, last))
        if channels[0] != last:
            conv = nn.Conv2d(channels[0], last, 1, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(last))


def resnet(
    blocks: tuple[int, ...],
    kernels: tuple[int, ...] = (3, 3),
    squeeze: bool = False,
    fc: nn.Module | None = None,
) -> nn.Module:
    """A ResNet as torchvision registers it; `blocks` per stage."""
    model = Bag(conv1=nn.Conv2d(3, 2, 7, bias=False), bn1=nn.BatchNorm2d(2))
    channels = 2
    for i, count in enumerate(blocks):
        layers = []
        for _ in range(count):
            width, wide = 2**i, 2 ** (i + 2)
            sizes = [channels, *[width] * (len(kernels) - 1), wide]
            layers.append(Residual(sizes, kernels, squeeze))
            channels = wide
        model.add_module(f"layer{i + 1}", nn.Sequential(*layers))
    if fc is not None:
        model.fc = fc
    return model


def resnet_roles(blocks: list[str], downsampled: list[str], convs: int) -> Expected:
    expected = at("", conv1=CONV, bn1=NORM)
    for i in range(1, convs + 1):
        expected |= at(*blocks, **{f"conv{i}": CONV, f"bn{i}": NORM})
    return expected | at(*downsampled, downsample__0=CONV, downsample__1=NORM)


FIRST = ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]
RESNET18 = resnet_roles(
    [f"{stage[:-1]}{i}" for stage in FIRST for i in range(2)], downsampled=FIRST, convs=2
)
RESNET50 = resnet_roles(
    [f"layer1.{i}" for i in range(3)] + [f"layer2.{i}" for i in range(4)]
    + [f"layer3.{i}" for i in range(6)] + [f"layer4.{i}" for i in range(3)],
    downsampled=FIRST, convs=3,
)  # fmt: skip


def test_resnet18():
    check(resnet((2, 2, 2, 2), fc=nn.Linear(32, 5)), RESNET18 | at("", fc=HEAD))
    check(resnet((2, 2, 2, 2)), RESNET18)
    check(resnet((2, 2, 2, 2), fc=nn.Identity()), RESNET18)


def test_resnet50():
    model = resnet((3, 4, 6, 3), kernels=(1, 3, 1), fc=nn.Linear(32, 5))
    check(model, RESNET50 | at("", fc=HEAD))
    check(resnet((3, 4, 6, 3), kernels=(1, 3, 1)), RESNET50)


@pytest.mark.parametrize("fc", [None, nn.Linear(32, 5)])
@pytest.mark.parametrize("count", [1, 2])
def test_linears_in_blocks_are_no_heads(count: int, fc: nn.Module | None):
    """As in squeeze-and-excitation; with one block per stage, the stages repeat."""
    blocks = [f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in range(count)]
    expected = resnet_roles(blocks, FIRST, convs=2)
    expected |= at(*blocks, se__0=LINEAR, se__2=LINEAR)
    expected |= at("", fc=HEAD) if fc else {}
    check(resnet((count,) * 4, squeeze=True, fc=fc), expected)


def vit(**head: nn.Module) -> nn.Module:
    """As torchvision writes it."""
    layers = nn.Sequential()
    for i in range(2):
        mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        block = Bag(ln_1=nn.LayerNorm(4), self_attention=nn.MultiheadAttention(4, 2),
                    ls=nn.Parameter(torch.ones(4)), mlp=mlp)  # fmt: skip
        layers.add_module(f"encoder_layer_{i}", block)
    encoder = Bag(pos_embedding=param(1, 5, 4), layers=layers, ln=nn.LayerNorm(4))
    return Bag(class_token=param(1, 1, 4), conv_proj=nn.Conv2d(3, 4, 2), encoder=encoder, **head)


VIT = {
    "class_token": "embedding",
    "conv_proj.weight": "conv",
    "conv_proj.bias": "bias",
    "encoder.pos_embedding": "embedding",
    "encoder.ln.weight": "norm",
    "encoder.ln.bias": "norm",
} | at(
    "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1",
    ln_1=NORM, self_attention=ATTENTION, mlp__0=LINEAR, mlp__2=LINEAR, **{"": {"ls": "other"}},
)  # fmt: skip


def test_vit():
    heads = nn.Sequential()
    heads.add_module("pre_logits", nn.Linear(4, 4))
    heads.add_module("head", nn.Linear(4, 3))
    roles = check(vit(heads=heads), VIT | at("", heads__pre_logits=LINEAR, heads__head=HEAD))
    name = "encoder.layers.encoder_layer_0.ls"
    assert f"match '{name}'" in roles[name].reason  # how to choose another role
    check(vit(), VIT)


def test_backbone_whose_head_was_taken_off():
    """As in timm: the remaining linear layer is no head."""
    check(vit(pre=nn.Linear(4, 4), head=nn.Identity()), VIT | at("", pre=LINEAR))
    check(vit(pre=nn.Linear(4, 4), head=nn.Conv2d(4, 3, 1)),
          VIT | at("", pre=LINEAR, head=HEAD))  # fmt: skip
