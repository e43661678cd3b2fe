"""Distinguish whole models, which have an output layer, from parts of models."""

from __future__ import annotations

from collections.abc import Sequence

from structprecond.roles.classes import io_sizes, is_depthwise, is_linear, is_norm
from structprecond.roles.graph import Node
from structprecond.roles.names import MLP_CLASS, PART_CLASS, kind, says


def is_part(nodes: Sequence[Node]) -> bool:
    """Return whether the modules, in order, are part of a model, such as a block.

    A part is recognized by its class, or by linear layers that lead to more features and back, as
    in the MLP of a transformer.
    """
    root = nodes[0].module
    if says(PART_CLASS, kind(root)) or nodes[0].attention:
        return True
    linears = [n for n in nodes if is_linear(n.module) and not n.attention]
    sizes = [io_sizes(n.module) for n in linears]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes) or len(known) not in (1, 2, 3):
        return False
    if says(MLP_CLASS, kind(root)) and (len(known) == 1 or known[0][0] == known[-1][1]):
        return True
    narrow, wide = min(map(min, known)), max(map(max, known))
    ends = known.count((wide, narrow)) == 1 and known.count((narrow, wide)) == len(known) - 1
    # layers that lead to fewer features and back are an autoencoder
    returns = narrow < wide and ends and (len(known) == 3 or known[0] == (narrow, wide))
    return returns and not any(map(_has_other_weights, nodes))


def _has_other_weights(node: Node) -> bool:
    module = node.module
    usual = is_linear(module) or is_norm(module) or is_depthwise(module) or node.attention
    return not usual and any(p.ndim > 1 for p in module.parameters(recurse=False))
