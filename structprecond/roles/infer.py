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
    """Find out what every parameter of a model is for.

    Embeddings and output heads have two axes too, but optimizers such as Muon are not for them. So
    the class of the module that owns a parameter and its place in the model decide; names count
    where those do not say enough, and shapes come last.

    | Role | Parameters |
    |------|------------|
    | `embedding` | embeddings; bare parameters such as `pos_embed` and `cls_token` |
    | `head` | weight of the output layer: tied to an embedding, named like `lm_head` or
      `classifier`, or else the last linear layer or 1x1 convolution outside of blocks; several
      heads if named so |
    | `norm` | all of a normalization layer |
    | `bias` | all other biases, that of a head too |
    | `conv` | weights of convolutions |
    | `depthwise` | weights of convolutions of each channel by itself |
    | `fused_qkv` | query, key and value projections in one weight |
    | `experts` | weights of many experts in one, with three axes or more |
    | `stack` | other matrices in one, such as those of all layers, `(layers, out, in)` |
    | `router` | what chooses among experts: routers, and gates with a row per expert |
    | `matrix` | all other weights with two axes, and `(d, heads, d_head)` in attention |
    | `other` | the rest: layer scales, slopes, other weights with three axes, ... |

    A part of a model, such as one of its blocks, has no output layer unless one is named so. It is
    known by its class, say `DecoderLayer`, or by its linear layers, which lead to more features and
    back.

    Args:
        model: Any module; frozen parameters and those on the meta device get a role too.

    Returns:
        The roles with their reasons, a mapping from the names of `model.named_parameters()`.

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
    # an optimizer asks once per param group and rule
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
    sites: dict[nn.Parameter, list[Site]] = {}  # by identity: the places of a tied parameter
    for node in nodes:
        for name, p in node.module.named_parameters(recurse=False, remove_duplicate=False):
            site = site_of(node, name)
            if is_lazy(p):
                raise StructPrecondError(
                    f"Parameter {site.full} of {type(node.module).__name__} has no shape yet; run "
                    "one forward pass before its role is asked for."
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
