"""Output layers without a name: the last layer of a whole model; parts of models have none."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from structprecond import Muon, describe
from structprecond.roles import infer_roles
from tests.roles.helpers import ATTENTION, CONV, HEAD, LINEAR, NORM, Bag, at, check, param

FILTER = CONV | {"bias": "bias"}


def heads(model: nn.Module) -> list[str]:
    return [name for name, role in infer_roles(model).items() if role.role == "head"]


class DoubleConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, bias=False)
        self.norm = nn.BatchNorm2d(outputs)


def test_unet():
    parts: dict[str, Any] = {
        "enter": DoubleConv(3, 4), "down1": DoubleConv(4, 8), "down2": DoubleConv(8, 8),
        "up1": DoubleConv(16, 4), "up2": DoubleConv(8, 4),
    }  # fmt: skip
    body = at(*parts, conv=CONV, norm=NORM)
    roles = check(Bag(**parts, last=nn.Conv2d(4, 2, 1)), body | at("", last=HEAD))
    reason = "output layer: last 1x1 convolution outside repeated blocks"
    assert roles["last.weight"].reason == reason
    check(Bag(**parts, outc=Bag(conv=nn.Conv2d(4, 2, 1))), body | at("outc", conv=HEAD))
    # a larger kernel may be any convolution
    check(Bag(**parts, last=nn.Conv2d(4, 2, 3)), body | at("", last=FILTER))
    # an output is not normalized
    check(Bag(**parts, last=nn.Conv2d(4, 2, 1), bn=nn.BatchNorm2d(2)),
          body | at("", last=FILTER, bn=NORM))  # fmt: skip
    # a layer in a list, and an encoder's last layer
    check(Bag(**parts, scales=nn.ModuleList([nn.Conv2d(4, 2, 1)])),
          body | at("scales", **{"0": FILTER}))  # fmt: skip
    check(Bag(**parts, encoder=Bag(last=nn.Conv2d(4, 2, 1))), body | at("encoder", last=FILTER))
    # in a side branch
    time = nn.Linear(4, 4)
    check(Bag(**parts, last=nn.Conv2d(4, 2, 1), time_mlp=time),
          body | at("", last=HEAD, time_mlp=LINEAR))  # fmt: skip


def test_last_of_linear_layers_and_convolutions():
    conv, fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
    check(Bag(conv=conv, fc=fc), at("", conv=FILTER, fc=HEAD))
    # as in an image generator: the first layer is no output
    check(Bag(fc=fc, up=nn.ConvTranspose2d(4, 3, 4)), at("", fc=LINEAR, up=FILTER))
    first = nn.Conv2d(3, 4, 3)
    check(Bag(first=first, fc=fc, conv=conv), at("", first=FILTER, fc=LINEAR, conv=HEAD))
    # alone, it may be any part of a model, such as squeeze-and-excitation
    check(Bag(fc1=conv, fc2=conv), at("", fc1=FILTER))


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 8)


class DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sa = nn.MultiheadAttention(4, 2)
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


LAYER = at("", sa=ATTENTION, norm1=NORM, norm2=NORM, mlp__0=LINEAR, mlp__2=LINEAR)


def test_block():
    check(DecoderLayer(), LAYER)
    model = Bag(layers=nn.ModuleList([DecoderLayer() for _ in range(2)]), out=nn.Linear(4, 9))
    part: Any = model.layers
    check(part[1], LAYER)
    assert not heads(part)
    assert heads(model) == ["out.weight"]
    routes = {name: row.strategy for row in describe(Muon(part[1])).rows for name in row.names}
    assert routes["mlp.2.weight"] == "MuonStrategy"


def test_block_of_any_class():
    """A block's linear layers lead to more features and back."""
    check(Bag(**dict(DecoderLayer().named_children())), LAYER)
    mixed = Bag(dw=nn.Conv2d(4, 4, 3, groups=4), norm=nn.LayerNorm(4), up=nn.Linear(4, 8),
                down=nn.Linear(8, 4), scale=param(4))  # fmt: skip
    depthwise = {"weight": "depthwise", "bias": "bias"}
    check(mixed, {"scale": "other"} | at("", dw=depthwise, norm=NORM, up=LINEAR, down=LINEAR))


@pytest.mark.parametrize("name", ["Block", "DecoderLayer", "ResidualBlock", "BasicBlock2d",
                                  "FusedMoE", "TransformerEncoder"])  # fmt: skip
def test_parts_are_known_by_their_class(name: str):
    part = type(name, (Bag,), {})(fc1=nn.Linear(4, 3), fc2=nn.Linear(3, 2))
    check(part, at("", fc1=LINEAR, fc2=LINEAR))
    assert not heads(type(name, (Bag,), {})(out=nn.Conv2d(4, 2, 1)))
    # but its class or a name may still be that of a head
    named = type(name, (Bag,), {})(fc=nn.Linear(4, 4), lm_head=nn.Linear(4, 9))
    check(named, at("", fc=LINEAR, lm_head=HEAD))


def test_attention_alone():
    class CausalAttention(Bag):
        pass

    part = CausalAttention(qkv=nn.Linear(4, 12), proj=nn.Linear(4, 4))
    check(part, at("", qkv={"weight": "fused_qkv", "bias": "bias"}, proj=LINEAR))
    whole = CausalAttention(words=nn.Embedding(9, 4), fc=nn.Linear(4, 4), score=nn.Linear(4, 9))
    check(whole, {"words.weight": "embedding"} | at("", fc=LINEAR, score=HEAD))


def test_one_mlp_block():
    class MLP(Bag):
        pass

    class FeedForward(Bag):
        pass

    up, down = nn.Linear(4, 8), nn.Linear(8, 4)
    check(nn.Sequential(up, nn.GELU(), down), at("", **{"0": LINEAR, "2": LINEAR}))
    for cls in (MLP, FeedForward, Bag):
        check(cls(fc1=up, fc2=down), at("", fc1=LINEAR, fc2=LINEAR))
    check(SwiGLU(), at("", w1=LINEAR, w2=LINEAR, w3=LINEAR))
    check(MLP(proj=nn.Linear(4, 8)), at("", proj=LINEAR))  # names of decode heads
    # whole models
    check(MLP(fc1=nn.Linear(4, 8), fc2=nn.Linear(8, 3)), at("", fc1=LINEAR, fc2=HEAD))
    check(MLP(fc1=nn.Linear(4, 4), fc2=nn.Linear(4, 3)), at("", fc1=LINEAR, fc2=HEAD))
    check(Bag(fc1=nn.Linear(4, 2), fc2=nn.Linear(2, 4)), at("", fc1=LINEAR, fc2=HEAD))
    check(Bag(fc1=nn.Linear(4, 4), fc2=nn.Linear(4, 4)), at("", fc1=LINEAR, fc2=HEAD))
    check(Bag(words=nn.Embedding(9, 4), fc1=up, fc2=down),
          {"words.weight": "embedding"} | at("", fc1=LINEAR, fc2=HEAD))  # fmt: skip
    assert heads(Bag(rnn=nn.RNN(4, 4), fc1=up, fc2=down)) == ["fc2.weight"]
    assert heads(nn.Linear(4, 2)) == ["weight"]
