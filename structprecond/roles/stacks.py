"""Weights with three axes: stacks of matrices, or one matrix with separate heads."""

from __future__ import annotations

from torch import nn

from structprecond.roles.classes import is_layer_of_torch, is_linear
from structprecond.roles.graph import Node, Site
from structprecond.roles.names import SHORT_BIAS, STACK, kind, says
from structprecond.roles.result import Role, RoleName


def stack_role(site: Site, p: nn.Parameter) -> Role | None:
    """Return the role of a weight with three axes, or one vector per layer; None if unclear.

    Shapes tell which axis counts matrices: there are fewer layers and heads than features. In
    `(d, heads, d_head)`, as in XLNet, the last two axes together are one axis of the matrix.
    """
    node, name = site.node, kind(site.node.module)
    layers = _stack_around(node)
    if p.ndim == 2 and layers is not None and _is_vector_of(layers, site, p):
        role: RoleName = "bias" if says(SHORT_BIAS, site.name) else "other"
        return Role(role, f"a vector per layer, in {layers.path}")
    if p.ndim != 3 or min(p.shape) < 2 or is_layer_of_torch(node.module) != is_linear(node.module):
        return None
    count, rows, columns = p.shape
    if is_linear(node.module):
        return Role("stack", f"{count} matrices in one {site.name} of {name}")
    if layers is not None:
        return Role("stack", f"a matrix for each of {count} layers, in {layers.path}")
    if node.attention and count > rows:
        return Role("matrix", f"{rows} heads of size {columns} in one projection of {name}")
    if count <= min(rows, columns):
        return Role("stack", f"{count} matrices by its shape, in {name}")
    return None


def _stack_around(node: Node) -> Node | None:
    """Return the module that holds all layers in one: named like `layers`, no numbers below."""
    for place in (node, *node.ancestors):
        if place.name.isdigit():
            return None
        if says(STACK, place.name, kind(place.module)):
            return place
    return None


def _is_vector_of(layers: Node, site: Site, p: nn.Parameter) -> bool:
    counts = {q.shape[0] for q in layers.module.parameters() if q.ndim == 3}
    return p.shape[0] in counts and not is_linear(site.node.module)
