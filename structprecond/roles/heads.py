"""Which layers of a model are its output layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from structprecond.roles.classes import (
    io_sizes,
    is_conv,
    is_depthwise,
    is_embedding,
    is_linear,
    is_norm,
    is_pointwise,
)
from structprecond.roles.graph import Node, Site, is_encoder, names_head
from structprecond.roles.names import AUXILIARY, MLP_CLASS, PART_CLASS, kind, says


def tie(sites: Sequence[Site]) -> str | None:
    """Return why a parameter is a tied head, if it is one."""
    embeddings = [s.node.path for s in sites if is_embedding(s.node.module)]
    linears = [s.node.path for s in sites if is_linear(s.node.module)]
    if not (embeddings and linears):
        return None
    return f"tied: embedding {embeddings[0]} and linear layer {linears[0]}"


def find_heads(nodes: Sequence[Node], tied: bool) -> dict[nn.Module, str]:
    """Return the linear layers and convolutions that are heads, and why.

    Args:
        nodes: All modules of the model, in order.
        tied: Whether there is a head that is tied to an embedding.
    """
    normed = _normed(nodes)
    layers = [
        n
        for n in nodes
        if (is_linear(n.module) or (is_conv(n.module) and not is_depthwise(n.module)))
        and not (n.repeated or n.attention or n.router)
    ]
    possible = {n for n in layers if n not in normed}
    inside = [n for n in nodes if n.head is not None]
    last = {n.head or "": n for n in inside if n in possible or is_norm(n.module)}
    # What is named a head but ends in a norm transforms features for a head behind it.
    transforms = {path for path, n in last.items() if is_norm(n.module)}
    # The innermost name counts: a decode head may transform a lot before its classifier.
    around = {
        a.head for path, n in last.items() if path not in transforms for a in n.ancestors
        if a.head is not None and a.head != path
    }  # fmt: skip
    # A backbone without its head has an identity there.
    replaced = any(
        n.head not in transforms and (n.module._parameters or isinstance(n.module, nn.Identity))
        for n in inside
    )
    bare = any(
        not n.repeated and names_head(n, name) for n in nodes for name in n.module._parameters
    )
    named = [n for path, n in last.items() if path not in transforms and path not in around]
    found = {n.module: _named(n) for n in named}
    only_aside = bool(named) and all(map(_is_auxiliary, named))
    if tied or bare or (replaced and not only_aside) or _is_part(nodes):
        return found
    return found | _final([n for n in layers if not (n.aside or _is_auxiliary(n))], normed)


def _named(node: Node) -> str:
    what = "linear layer" if is_linear(node.module) else "convolution"
    by_class = f"of {kind((node, *node.ancestors)[-1].module)}"
    return f"{what} named {node.head}" if node.head else f"{what} {by_class}"


def _is_auxiliary(node: Node) -> bool:
    return any(says(AUXILIARY, place.name) for place in (node, *node.ancestors))


def _final(layers: Sequence[Node], normed: set[Node]) -> dict[nn.Module, str]:
    """Return the last of some layers if it may be an output layer."""
    last = layers[-1] if layers else None
    if last is None or last in normed:
        return {}
    if is_linear(last.module):
        return {last.module: "output layer: last linear layer outside repeated blocks"}
    listed = last.parent is not None and isinstance(last.parent.module, nn.ModuleList)
    if not is_pointwise(last.module) or listed or is_encoder(last):
        return {}
    return {last.module: "output layer: last convolution, of size 1, outside of blocks"}


def _normed(nodes: Sequence[Node]) -> set[Node]:
    """Return the convolutions whose outputs are normalized, which those of a model are not."""
    own = [n for n in nodes if n.module._parameters]
    return {n for n, after in pairwise(own) if is_conv(n.module) and is_norm(after.module)}


def _is_part(nodes: Sequence[Node]) -> bool:
    """Whether the module is a part of a model, such as one of its blocks, which has no output.

    Its class may say so, or that its linear layers lead to more features and back, as in the MLP of
    a transformer.
    """
    root = nodes[0].module
    if says(PART_CLASS, kind(root)) or nodes[0].attention:
        return True
    linears = [n for n in nodes if is_linear(n.module) and not n.attention]
    sizes = [io_sizes(n.module) for n in linears]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes) or len(known) not in (2, 3):
        return False
    keeps = known[0][0] in (known[-1][1], known[-1][0])
    if says(MLP_CLASS, kind(root)):
        return keeps
    narrow, wide = min(map(min, known)), max(map(max, known))
    ends = known.count((wide, narrow)) == 1 and known.count((narrow, wide)) == len(known) - 1
    # the other way round, it is an autoencoder
    returns = narrow < wide and ends and (len(known) == 3 or known[0] == (narrow, wide))
    return returns and not any(map(_has_other_weights, nodes))


def _has_other_weights(node: Node) -> bool:
    module = node.module
    usual = is_linear(module) or is_norm(module) or is_depthwise(module) or node.attention
    return not usual and any(p.ndim > 1 for p in module.parameters(recurse=False))
