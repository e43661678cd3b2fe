"""The modules of a model and their places in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from structprecond.roles.classes import BLOCKS, PLAIN, io_sizes, is_embedding, is_linear
from structprecond.roles.names import (
    ASIDE,
    ATTENTION,
    AUXILIARY,
    CONV_OUT,
    ENCODER,
    HEAD,
    HEAD_CLASS,
    KEY,
    ROUTER,
    VALUE,
    WRAPPERS,
    kind,
    says,
)


@dataclass(frozen=True, eq=False)
class Node:
    """A module and its place in the model.

    Args:
        path: Its name in the model.
        name: Its name in its parent.
        module: The module.
        parent: The module that contains it.
        repeated: Whether it is in a repeated block.
        attention: Whether it is in an attention layer.
        aside: Whether it is in a side branch, off the path to the output.
        router: Whether it is in a module that is named like a router.
        head: The path of the innermost module that contains it and is named like a head.
    """

    path: str
    name: str
    module: nn.Module
    parent: Node | None = None
    repeated: bool = False
    attention: bool = False
    aside: bool = False
    router: bool = False
    head: str | None = None

    @cached_property
    def ancestors(self) -> tuple[Node, ...]:
        """All modules that contain it, innermost first."""
        return () if self.parent is None else (self.parent, *self.parent.ancestors)

    @property
    def listed(self) -> bool:
        """Whether it is a list or dict of parameters, whose name describes them."""
        return isinstance(self.module, nn.ParameterList | nn.ParameterDict)


class Site(NamedTuple):
    """A place where a parameter is registered: a module, and the name in it."""

    full: str
    node: Node
    name: str
    magnitude: bool = False  # of weight normalization


def nodes_of(model: nn.Module) -> list[Node]:
    """Return every module once, in the order of `named_modules`."""
    name = kind(model)
    # a whole model may be named after its attention
    alone = says(ATTENTION, name) and not any(map(is_embedding, model.modules()))
    root = Node(
        path="",
        name="",
        module=model,
        repeated=isinstance(model, BLOCKS),
        attention=alone,
        router=_is_router("", model),
        head="" if says(HEAD_CLASS, name) else None,
    )
    return list(_walk(root, set()))


def site_of(node: Node, name: str) -> Site:
    """Return the place of a parameter; for a parametrized or pruned one, that of the original."""
    full = _join(node.path, name)
    if isinstance(node.module, ParametrizationList) and node.parent and node.parent.parent:
        magnitude = name == "original0" and "_WeightNorm" in map(kind, node.module)
        return Site(full, node.parent.parent, node.name, magnitude)
    base, _, suffix = name.rpartition("_")
    if suffix in ("orig", "v", "g") and base in vars(node.module):
        return Site(full, node, base, magnitude=suffix == "g")
    return Site(full, node, name)


def names_head(parent: Node, name: str) -> bool:
    """Return whether a child or parameter of a module is named like a head."""
    if says(VALUE, name):
        siblings = (*parent.module._modules, *parent.module._parameters)
        return says(HEAD, name) and not any(says(KEY, sibling) for sibling in siblings)
    if says(CONV_OUT, name):
        return not is_encoder(parent)
    # a box head computes the features for a box predictor
    if name.endswith("_head") and f"{name[:-5]}_predictor" in parent.module._modules:
        return False
    return says(HEAD, name) or says(AUXILIARY, name)


def is_encoder(node: Node) -> bool:
    """Return whether a module is an encoder or part of one."""
    return any(says(ENCODER, place.name) for place in (node, *node.ancestors))


def _unwrap(path: str, module: nn.Module) -> tuple[str, nn.Module]:
    """Skip wrappers, such as those of DistributedDataParallel and `torch.compile`."""
    while len(module._modules) == 1 and not module._parameters:
        ((name, inner),) = module._modules.items()
        if name not in WRAPPERS or inner is None:
            break
        path, module = _join(path, name), inner
    return path, module


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _walk(node: Node, seen: set[nn.Module]) -> Iterator[Node]:
    if node.module in seen:
        return
    seen.add(node.module)
    yield node
    children = [
        (name, *_unwrap(_join(node.path, name), module))
        for name, module in node.module.named_children()
    ]
    blocks = _blocks(node.module, [(name, module) for name, _, module in children])
    heads = _holds_heads(node)
    for name, path, module in children:
        named = heads or _is_called_head(node, name, module)
        attention = node.attention or says(ATTENTION, name, kind(module))
        repeated = node.repeated or (name in blocks and not named)
        router = node.router or _is_router(name, module)
        head = path if named and not (repeated or attention or router) else node.head
        aside = node.aside or says(ASIDE, name)
        child = Node(path, name, module, node, repeated, attention, aside, router, head)
        yield from _walk(child, seen)


def _is_router(name: str, module: nn.Module) -> bool:
    return says(ROUTER, name) or kind(module).endswith("Router")


def _is_called_head(parent: Node, name: str, module: nn.Module) -> bool:
    if is_embedding(module):  # for example of class labels
        return False
    return names_head(parent, name) or says(HEAD_CLASS, kind(module))


def _holds_heads(node: Node) -> bool:
    """Return whether a list, which is or is in a head, holds several heads, not layers of one."""
    if node.head is None or not isinstance(node.module, nn.ModuleList | nn.ModuleDict):
        return False
    own = node.head == node.path
    children = list(node.module.children())
    sizes = [_channels(module) for module in children]
    if None in sizes or isinstance(node.module, nn.ModuleDict):
        return own
    pairs = pairwise(size for size in sizes if size is not None)
    chained = all(outputs == inputs for (_, outputs), (inputs, _) in pairs)
    return len(children) > 1 and (not chained or (own and node.name.endswith("s")))


def _channels(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, _ConvNd):
        return module.in_channels, module.out_channels
    return io_sizes(module) if is_linear(module) else None


def _blocks(parent: nn.Module, children: list[tuple[str, nn.Module]]) -> set[str]:
    """Return the names of repeated blocks: children of one class whose names differ by a number.

    So an encoder and a decoder of the same class are none. A list may have a single block.
    """
    alike: dict[object, list[str]] = {}
    found: set[str] = set()
    for name, module in children:
        if is_linear(module) or not module._modules or next(module.parameters(), None) is None:
            continue
        plain = type(module) in PLAIN  # compared by the classes of the contents
        content = tuple(type(m) for m in module.children()) if plain else ()
        alike.setdefault((re.sub(r"\d+", "0", name), type(module), content), []).append(name)
        if (isinstance(parent, nn.ModuleList) and not plain) or isinstance(module, BLOCKS):
            found.add(name)
    return found.union(*(names for names in alike.values() if len(names) > 1))
