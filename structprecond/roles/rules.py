"""The role of one parameter: by its module, else by names, else by its shape."""

from __future__ import annotations

import re

from torch import nn

from structprecond.roles.classes import (
    RNNS,
    is_called_depthwise,
    is_conv,
    is_depthwise,
    is_embedding,
    is_linear,
    is_norm,
)
from structprecond.roles.experts import experts_role, router_role
from structprecond.roles.graph import Site, names_head
from structprecond.roles.names import ANY, BIAS, EMBEDDING, INNER, LOGARITHM, NORM, QKV, kind, says
from structprecond.roles.result import Role
from structprecond.roles.stacks import stack_role


def role_of(site: Site, p: nn.Parameter, heads: dict[nn.Module, str]) -> Role:
    """Return the role of a parameter at one of its places.

    `heads` maps the output layers of the model to the reasons for it.
    """
    if site.magnitude:
        return Role("other", f"magnitude of a weight of {kind(site.node.module)}")
    return _by_module(site, p, heads) or _by_name(site, p) or _by_shape(site, p)


def _by_module(site: Site, p: nn.Parameter, heads: dict[nn.Module, str]) -> Role | None:
    node, module, name = site.node, site.node.module, kind(site.node.module)
    known = type(module).__module__.startswith("torch.nn.") or is_linear(module) or is_conv(module)
    if is_norm(module):
        return Role("norm", f"{site.name} of {name}")
    if says(BIAS, site.name) and (known or not says(NORM, node.name)):
        return Role("bias", f"bias of {name}")
    if is_conv(module) and site.name == "weight":
        return _of_conv(module, heads)
    if is_embedding(module) and p.ndim > 1:
        return Role("embedding", f"{site.name} of {name}")
    if of_experts := experts_role(site, p) or router_role(site, p):
        return of_experts
    if p.ndim != 2:
        return None
    if isinstance(module, nn.MultiheadAttention) and site.name == "in_proj_weight":
        return Role("fused_qkv", f"{site.name} of {name}")
    if isinstance(module, (nn.MultiheadAttention, *RNNS)):
        return Role("matrix", f"{site.name} of {name}")
    return _of_linear(site, p, heads) if is_linear(module) else None


def _of_conv(module: nn.Module, heads: dict[nn.Module, str]) -> Role:
    if module in heads:
        return Role("head", heads[module])
    if is_depthwise(module):
        return Role("depthwise", f"weight of {kind(module)}, with a group per channel")
    return Role("conv", f"weight of {kind(module)}")


def _of_linear(site: Site, p: nn.Parameter, heads: dict[nn.Module, str]) -> Role:
    node, module, name = site.node, site.node.module, kind(site.node.module)
    if module in heads:
        return Role("head", heads[module])
    inputs, outputs = p.shape if name.endswith("Conv1D") else p.shape[::-1]
    named = node.parent.name if node.parent and says(INNER, node.name) else node.name
    in_proj = named == "in_proj" and node.attention
    if (in_proj or says(QKV, named)) and outputs > inputs:
        return Role("fused_qkv", f"linear layer named {named}, more outputs than inputs")
    expert = ", of one expert" if "expert" in node.path.lower() else ""
    return Role("matrix", f"{site.name} of {name}{expert}")


def _by_name(site: Site, p: nn.Parameter) -> Role | None:
    """Return the role by the name of a parameter of an unknown class, or of its module."""
    node, name = site.node, site.name.removesuffix("_weight")
    for word in (name, *([node.name] if node.listed or says(ANY, name) else [])):
        # A custom layer named like an embedding may be a convolution of patches.
        if says(EMBEDDING, word) and (word == name or node.listed or p.ndim == 2):
            return Role("embedding", f"named {word}")
        if says(LOGARITHM, word):
            return Role("other", f"named {word}, a logarithm")
        if says(NORM, word):
            return Role("norm", f"named {word}")
        if p.ndim == 2 and not (node.repeated or node.attention) and names_head(node, word):
            return Role("head", f"named {word}")
        if says(QKV, word) and p.ndim == 2 and p.shape[0] != p.shape[1]:
            return Role("fused_qkv", f"named {word}, not square")
    return stack_role(site, p)


def _by_shape(site: Site, p: nn.Parameter) -> Role:
    name = kind(site.node.module)
    vector = sum(size != 1 for size in p.shape) < 2
    if p.ndim == 2 and not vector:
        return Role("matrix", f"two axes, in {name}")
    if p.ndim in (4, 5) and not vector:
        if p.shape[1] == 1 and is_called_depthwise(site.node.module, site.node.name):
            return Role("depthwise", f"by its shape and name, in {name}")
        return Role("conv", f"by its shape, in {name}")
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", site.full)
    axes = "a vector or scalar" if vector else f"{p.ndim} axes"
    return Role("other", f"{axes}, in {name}; to route it, match {pattern!r}")
