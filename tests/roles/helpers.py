"""Models to put together, and what is expected of their parameters."""

from __future__ import annotations

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
    """Compare with what is expected, parameter by parameter and in the model's order."""
    roles = infer_roles(model)
    assert {name: role.role for name, role in roles.items()} == expected
    assert [(n, r.shape) for n, r in roles.items()] == [
        (n, tuple(p.shape)) for n, p in model.named_parameters()
    ]
    assert all(role.reason for role in roles.values())
    return roles


class Bag(nn.Module):
    """Whatever modules and parameters, registered in the given order."""

    def __init__(self, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))
