"""The role of every parameter of a model."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.parameter import is_lazy

from structprecond.errors import StructPrecondError
from structprecond.roles.graph import Site, nodes_of, site_of
from structprecond.roles.heads import find_heads, tie
from structprecond.roles.result import Role, Roles
from structprecond.roles.rules import role_of


def infer_roles(model: nn.Module) -> Roles:
    """Infer the role of every parameter of a model.

    Embeddings and output heads have two axes like hidden matrices, but Muon, for example, does not
    suit them. So the class and the place of a parameter's module decide, then names, then shapes.

    | Role | Parameters |
    |------|------------|
    | `embedding` | embeddings; bare parameters such as `pos_embed` and `cls_token` |
    | `head` | weights of output layers: tied to an embedding, or named like `lm_head` or
      `classifier`, else the last linear layer or 1x1 convolution outside repeated blocks |
    | `norm` | all parameters of normalization layers |
    | `bias` | all other biases, also of heads |
    | `conv` | weights of convolutions |
    | `depthwise` | weights of depthwise convolutions |
    | `fused_qkv` | query, key and value projections in one weight |
    | `experts` | weights of several experts in one parameter, with three or more axes |
    | `stack` | other matrices in one parameter, such as all layers, `(layers, out, in)` |
    | `router` | weights that choose among experts: routers, gates with one row per expert |
    | `matrix` | all other weights with two axes, and `(d, heads, d_head)` in attention |
    | `other` | the rest: layer scales, slopes, other weights with three axes, ... |

    A part of a model, such as a block, has no output layer unless one is named so. It is recognized
    by its class, such as `DecoderLayer`, or by linear layers that lead to more features and back.

    Args:
        model: Any module, also on the meta device; frozen parameters have roles too.

    Returns:
        The roles with their reasons, by the names of `model.named_parameters()`.

    Raises:
        StructPrecondError: If a lazy module has not seen its first input.

    Example:
        >>> print(infer_roles(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2))))
        parameter  shape  role       reason
        ------------------------------------------------------------------------------------
        0.weight   9x4    embedding  weight of Embedding
        1.weight   4x4    matrix     weight of Linear
        1.bias     4      bias       bias of Linear
        2.weight   2x4    head       output layer: last linear layer outside repeated blocks
        2.bias     2      bias       bias of Linear
    """
    # cached, since an optimizer asks once per param group and rule
    places = tuple(
        (path, name, id(p), () if is_lazy(p) else p.shape)
        for path, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
    )
    if _known.get(model, ((), Roles()))[0] != places or not places:
        _known[model] = (places, _find_roles(model))
    return Roles(_known[model][1])


_known: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Roles]] = WeakKeyDictionary()


def _find_roles(model: nn.Module) -> Roles:
    nodes = nodes_of(model)
    sites: dict[nn.Parameter, list[Site]] = {}  # all places of each parameter: several if tied
    for node in nodes:
        for name, p in node.module.named_parameters(recurse=False, remove_duplicate=False):
            site = site_of(node, name)
            if is_lazy(p):
                raise StructPrecondError(
                    f"Parameter {site.full} of {type(node.module).__name__} has no shape yet. Run "
                    "one forward pass before you infer roles."
                )
            sites.setdefault(p, []).append(site)
    tied = {p: reason for p, places in sites.items() if (reason := tie(places))}
    heads = find_heads(nodes, tied=bool(tied))
    roles = Roles()
    for p, places in sites.items():
        found = [role_of(site, p, heads) for site in places]
        # A weight that two linear layers share is a head if one of them is.
        role = next((r for r in found if r.role == "head"), found[0])
        role = Role("head", tied[p]) if p in tied else role
        roles[places[0].full] = role._replace(shape=tuple(p.shape))
    return roles
