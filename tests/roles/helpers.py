"""Building blocks of models, and the expected roles of their parameters."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from structprecond.roles import Roles, infer_roles

Expected = dict[str, str]

LINEAR = {"weight": "matrix", "bias": "bias"}
HEAD = {"weight": "head", "bias": "bias"}
NORM = {"weight": "norm", "bias": "norm"}
CONV = {"weight": "conv"}
ATTENTION = {
    "in_proj_weight": "fused_qkv", "in_proj_bias": "bias",
    "out_proj.weight": "matrix", "out_proj.bias": "bias",
}  # fmt: skip


def at(*paths: str, **parts: Expected) -> Expected:
    """Spell out parts, such as `fc1=LINEAR`, at every path; `__` in their names is a dot."""
    return {
        ".".join(filter(None, (path, part.replace("__", "."), name))): role
        for path in paths
        for part, names in parts.items()
        for name, role in names.items()
    }


def check(model: nn.Module, expected: Expected) -> Roles:
    """Compare roles with the expected ones, for each parameter in the model's order."""
    roles = infer_roles(model)
    assert {name: role.role for name, role in roles.items()} == expected
    assert [(n, r.shape) for n, r in roles.items()] == [
        (n, tuple(p.shape)) for n, p in model.named_parameters()
    ]
    assert all(role.reason for role in roles.values())
    return roles


class Bag(nn.Module):
    """Any modules and parameters, registered in the given order."""

    def __init__(self, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for n, m in pairwise(sizes) for layer in (nn.Linear(n, m), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class GPTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(8)
        self.attn = Bag(c_attn=nn.Linear(8, 24), c_proj=nn.Linear(8, 8))
        self.ln_2 = nn.LayerNorm(8)
        self.mlp = Bag(c_fc=nn.Linear(8, 32), c_proj=nn.Linear(32, 8))


GPT_BLOCK = at(
    "", ln_1=NORM, ln_2=NORM, attn__c_attn={"weight": "fused_qkv", "bias": "bias"},
    attn__c_proj=LINEAR, mlp__c_fc=LINEAR, mlp__c_proj=LINEAR,
)  # fmt: skip
GPT = {
    "transformer.wte.weight": "embedding",
    "transformer.wpe.weight": "embedding",
    "transformer.ln_f.weight": "norm",
    "transformer.ln_f.bias": "norm",
    "lm_head.weight": "head",
}


def gpt(layers: int = 2, tied: bool = False, head_first: bool = False) -> nn.Module:
    model = Bag(lm_head=nn.Linear(8, 11, bias=False)) if head_first else Bag()
    model.transformer = nn.ModuleDict(
        {
            "wte": nn.Embedding(11, 8),
            "wpe": nn.Embedding(6, 8),
            "h": nn.ModuleList([GPTBlock() for _ in range(layers)]),
            "ln_f": nn.LayerNorm(8),
        }
    )
    if not head_first:
        model.lm_head = nn.Linear(8, 11, bias=False)
    if tied:
        model.lm_head.weight = model.transformer["wte"].weight  # type: ignore[union-attr]
    return model


def gpt_blocks(layers: int = 2) -> Expected:
    return at(*(f"transformer.h.{i}" for i in range(layers)), **{"": GPT_BLOCK})
