"""Mixtures of experts: the weights of experts and of routers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from structprecond.roles.classes import is_linear
from structprecond.roles.graph import Node, Site
from structprecond.roles.names import EXPERTS, GATE, ROUTER, SHORT_BIAS, kind, says
from structprecond.roles.result import Role


def router_role(site: Site, p: nn.Parameter) -> Role | None:
    """Return the role of a weight that chooses among experts, None for other parameters.

    Routers are known by their names. A gate is a router if it is next to experts and has one row
    per expert. The gate of a gated MLP is not: it may be inside an expert, but not next to one.
    """
    if p.ndim != 2:
        return None
    node = site.node
    if node.router:
        outermost = [place for place in (node, *node.ancestors) if place.router][-1]
        return Role("router", f"{site.name} of the router {outermost.path}".rstrip())
    if says(ROUTER, site.name):
        return Role("router", f"named {site.name}")
    for name, beside in _places(site):
        if says(GATE, name):
            counts = set(_counts_of_experts(beside))
            # outside linear layers, weights may be stored transposed
            rows = p.shape[:1] if is_linear(node.module) else p.shape
            if counts.intersection(rows):
                return Role("router", f"named {name}, with one row per expert")
    return None


def experts_role(site: Site, p: nn.Parameter) -> Role | None:
    """Return the role of a parameter with values for every expert, None for other parameters."""
    owners, name = _owners(site.node), kind(site.node.module)
    if p.ndim > 2 and says(EXPERTS, site.name, *owners):
        return Role("experts", f"many experts in one {site.name} of {name}")
    if p.ndim == 2 and says(SHORT_BIAS, site.name) and says(EXPERTS, *owners):
        return Role("bias", f"a vector per expert of {name}")
    return None


def _places(site: Site) -> Iterator[tuple[str, Node]]:
    """Yield the names that a gate may have, each with the module that contains it."""
    node = site.node
    yield site.name, node
    while node.parent is not None:
        yield node.name, node.parent
        # a gate may have several layers, or be in a list
        node = node.parent
        if not isinstance(node.module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            yield node.name, node.parent or node
            break


def _counts_of_experts(node: Node) -> Iterator[int]:
    """Yield possible numbers of experts in a module, from its lists and stacks of experts."""
    of_experts = says(EXPERTS, *_owners(node))
    for name, p in node.module.named_parameters(recurse=False):
        if p.ndim > 2 and (of_experts or says(EXPERTS, name)):
            yield p.shape[0]
    for name, child in node.module.named_children():
        if says(EXPERTS, name, kind(child)):
            for module in (child, *child.children()):
                yield from (p.shape[0] for p in module.parameters(recurse=False) if p.ndim > 2)
                if isinstance(module, nn.ModuleList | nn.ModuleDict):
                    yield len(module)


def _owners(node: Node) -> tuple[str, ...]:
    """Return the names of a module and its class; for lists of parameters, also of the owner."""
    own = (node.name, kind(node.module))
    return (*own, *_owners(node.parent)) if node.listed and node.parent else own
