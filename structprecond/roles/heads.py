"""The output layers of a model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from structprecond.roles.classes import (
    is_conv,
    is_depthwise,
    is_embedding,
    is_linear,
    is_norm,
    is_pointwise,
)
from structprecond.roles.graph import Node, Site, is_encoder, names_head
from structprecond.roles.names import AUXILIARY, kind, says
from structprecond.roles.parts import is_part


def tie(sites: Sequence[Site]) -> str | None:
    """Return why a parameter is a tied head, None if it is not."""
    embeddings = [s.node.path for s in sites if is_embedding(s.node.module)]
    linears = [s.node.path for s in sites if is_linear(s.node.module)]
    if not (embeddings and linears):
        return None
    return f"tied: embedding {embeddings[0]} and linear layer {linears[0]}"


def find_heads(nodes: Sequence[Node], tied: bool) -> dict[nn.Module, str]:
    """Return the linear layers and convolutions that are heads, and why.

    Args:
        nodes: All modules of the model, in order.
        tied: Whether a head is tied to an embedding.
    """
    normed = _normed(nodes)
    layers = [
        n
        for n in nodes
        if (is_linear(n.module) or (is_conv(n.module) and not is_depthwise(n.module)))
        and not (n.repeated or n.attention or n.router)
    ]
    named, replaced = _by_name(nodes, {n for n in layers if n not in normed})
    found = {n.module: _reason(n) for n in named}
    bare = any(
        not n.repeated and names_head(n, name) for n in nodes for name in n.module._parameters
    )
    only_aside = bool(named) and all(map(_is_auxiliary, named))
    if tied or bare or (replaced and not only_aside) or is_part(nodes):
        return found
    # without larger convolutions, this is no dense predictor, only part of one
    dense = any(is_conv(n.module) and not is_pointwise(n.module) for n in nodes)
    onward = [n for n in layers if not (n.aside or _is_auxiliary(n))]
    return found | _final(onward, normed, dense)


def _by_name(nodes: Sequence[Node], possible: set[Node]) -> tuple[list[Node], bool]:
    """Return the named heads, and whether something replaces a head, such as an identity."""
    inside = [n for n in nodes if n.head is not None]
    last = {n.head: n for n in inside if n in possible or is_norm(n.module)}
    # A module named like a head that ends in a norm transforms features for the real head.
    transforms = {path for path, n in last.items() if is_norm(n.module)}
    ends = {path: n for path, n in last.items() if path not in transforms}
    # The innermost name counts: a decode head may have many layers before its classifier.
    around = {a.head for path, n in ends.items() for a in n.ancestors if a.head != path}
    replaced = any(
        n.head not in transforms and (n.module._parameters or isinstance(n.module, nn.Identity))
        for n in inside
    )
    return [n for path, n in ends.items() if path not in around], replaced


def _reason(node: Node) -> str:
    what = "linear layer" if is_linear(node.module) else "convolution"
    by_class = f"of {kind((node, *node.ancestors)[-1].module)}"
    return f"{what} named {node.head}" if node.head else f"{what} {by_class}"


def _is_auxiliary(node: Node) -> bool:
    return any(says(AUXILIARY, place.name) for place in (node, *node.ancestors))


def _final(layers: Sequence[Node], normed: set[Node], dense: bool) -> dict[nn.Module, str]:
    """Return the last layer and the reason if it may be an output layer, else nothing.

    Layers in `normed` are followed by a norm. With `dense`, the last one may be a convolution.
    """
    last = layers[-1] if layers else None
    if last is None or last in normed:
        return {}
    if is_linear(last.module):
        return {last.module: "output layer: last linear layer outside repeated blocks"}
    listed = last.parent is not None and isinstance(last.parent.module, nn.ModuleList)
    if not (dense and is_pointwise(last.module)) or listed or is_encoder(last):
        return {}
    return {last.module: "output layer: last 1x1 convolution outside repeated blocks"}


def _normed(nodes: Sequence[Node]) -> set[Node]:
    """Return the convolutions that are followed by a norm, which are no output layers."""
    own = [n for n in nodes if n.module._parameters]
    return {n for n, after in pairwise(own) if is_conv(n.module) and is_norm(after.module)}
