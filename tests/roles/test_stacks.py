"""Weights with three axes: stacked layers, and separate heads."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import Muon
from tests.core.routed import warns_of_roles
from tests.roles.helpers import HEAD, Bag, at, check, param


class Attention(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        for name in "qkvor":
            setattr(self, name, param(*shape))
        self.r_w_bias, self.seg_embed = param(*shape[1:]), param(2, *shape[1:])


def test_projections_of_xlnet():
    """Projections of shape (d, heads, d_head) are matrices."""
    expected = {f"rel_attn.{name}": "matrix" for name in "qkvor"}
    expected |= {"rel_attn.r_w_bias": "bias", "rel_attn.seg_embed": "embedding"}
    roles = check(Bag(rel_attn=Attention(8, 2, 4)), expected)
    reason = "2 heads of size 4 in one projection of Attention"
    assert roles["rel_attn.q"].reason == reason
    buckets = [b for b in Muon(Bag(rel_attn=Attention(8, 2, 4))).buckets if b.key.shape == (8, 8)]
    assert [u.label for b in buckets for u in b.units] == [f"rel_attn.{n}" for n in "qkvor"]
    assert all(u.rows == 1 for b in buckets for u in b.units)


def test_heads_first():
    """In the shape (heads, d, d_head), each head is a matrix."""
    expected = {f"attn.{name}": "stack" for name in "qkvor"}
    check(Bag(attn=Attention(2, 8, 4)), expected
          | {"attn.r_w_bias": "bias", "attn.seg_embed": "embedding"})  # fmt: skip


class Layers(nn.Module):
    """All layers of an MLP in one module, as for `torch.func.stack_module_state` and scans."""

    def __init__(self, count: int, d: int, h: int) -> None:
        super().__init__()
        self.up, self.down = param(count, h, d), param(count, d, h)
        self.b_up, self.b1, self.norm = param(count, h), param(count, d), param(count, d)
        self.gain, self.steps = param(count, d), param(count)


@pytest.mark.parametrize("count", [2, 4, 12])
def test_layers_for_a_scan(count: int):
    model = Bag(embed=nn.Embedding(9, 4), layers=Layers(count, 4, 6), lm_head=nn.Linear(4, 9))
    layers = {"up": "stack", "down": "stack", "b_up": "other", "b1": "bias", "norm": "norm",
              "gain": "other", "steps": "other"}  # fmt: skip
    roles = check(model, {"embed.weight": "embedding"} | at("", layers=layers, lm_head=HEAD))
    assert roles["layers.up"].reason == f"a matrix for each of {count} layers, in layers"
    assert roles["layers.b1"].reason == "a vector per layer, in layers"


def test_numbered_layers_are_no_stack():
    """A weight in one of many layers is not a stack of all layers."""
    blocks = nn.ModuleList([Bag(mix=param(5, 4, 3)) for _ in range(2)])
    check(Bag(layers=blocks), {"layers.0.mix": "other", "layers.1.mix": "other"})


def test_linear_layers_with_a_weight_for_each_layer():
    layer = nn.Linear(4, 6)
    layer.weight, layer.bias = param(3, 6, 4), param(3, 6)
    roles = check(Bag(body=layer, head=nn.Linear(6, 2)),
                  at("", body={"weight": "stack", "bias": "bias"}, head=HEAD))  # fmt: skip
    assert roles["body.weight"].reason == "3 matrices in one weight of Linear"


def test_by_shape():
    """There are fewer layers than features."""
    shapes = {(3, 4, 6): "stack", (4, 4, 4): "stack", (6, 4, 3): "other", (4, 6, 3): "other",
              (1, 4, 6): "other"}  # fmt: skip
    model = nn.ParameterList([param(*shape) for shape in shapes])
    roles = check(model, {str(i): role for i, role in enumerate(shapes.values())})
    assert roles["0"].reason == "3 matrices by its shape, in ParameterList"
    check(nn.Bilinear(3, 4, 2), {"weight": "other", "bias": "bias"})


@pytest.mark.parametrize("given", ["model", "parameters", "named"])
def test_each_layer_is_orthogonalized_by_itself(given: str):
    torch.manual_seed(0)
    model = Bag(layers=Layers(3, 4, 6))
    up: Tensor = model.get_parameter("layers.up")
    params: dict[str, Any] = {
        "model": model, "parameters": model.parameters(), "named": model.named_parameters()
    }  # fmt: skip
    settings: Any = {"lr": 1.0, "momentum": 0.0, "fp32_matmul_prec": "highest"}
    with warns_of_roles() if given == "parameters" else nullcontext():
        optimizer = Muon(params[given], **settings)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    grad = up.grad.clone()  # type: ignore[union-attr]
    optimizer.step()
    single = [nn.Parameter(torch.zeros(6, 4)) for _ in range(3)]
    for p, g in zip(single, grad, strict=True):
        p.grad = g.clone()
        Muon([("layers.up", p)], **settings).step()
    torch.testing.assert_close(up.detach(), torch.stack([p.detach() for p in single]))
