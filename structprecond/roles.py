"""What every parameter of a model is for: embedding, head, norm, bias, a matrix inside, ..."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from structprecond.errors import StructPrecondError
from structprecond.tables import lay_out

RoleName = Literal[
    "embedding", "head", "norm", "bias", "conv", "fused_qkv", "experts", "matrix", "other"
]
ROLES: tuple[RoleName, ...] = get_args(RoleName)
"""All roles."""


class Role(NamedTuple):
    """What a parameter is for.

    Attributes:
        role: One of `ROLES`.
        reason: How that was found out.
        shape: The shape of the parameter.
    """

    role: RoleName
    reason: str
    shape: tuple[int, ...] = ()


class Roles(dict[str, Role]):
    """The role of every parameter by its name, in the order of the model; print it for a table."""

    def __str__(self) -> str:
        """Return a table with one line per parameter."""
        table = [("parameter", "shape", "role", "reason")]
        for name, (role, reason, shape) in self.items():
            table.append((name, "x".join(map(str, shape)) or "scalar", role, reason))
        return "\n".join(lay_out(table))


def infer_roles(model: nn.Module) -> Roles:
    """Find out what every parameter of a model is for.

    Embeddings and output heads have two axes too, but optimizers such as Muon are not for them. So
    the class of the module that owns a parameter and its place in the model decide; names count
    where those do not say enough, and shapes come last.

    | Role | Parameters |
    |------|------------|
    | `embedding` | embeddings; bare parameters such as `pos_embed` and `cls_token` |
    | `head` | weight of the last linear layer: tied to an embedding, named like `lm_head` or
      `classifier`, or else the last one outside of blocks; several heads if named so |
    | `norm` | all of a normalization layer |
    | `bias` | all other biases, that of a head too |
    | `conv` | weights of convolutions |
    | `fused_qkv` | query, key and value projections in one weight |
    | `experts` | weights of many experts in one, with three axes or more |
    | `matrix` | all other weights with two axes |
    | `other` | the rest: layer scales, slopes, weights with three axes, ... |

    Args:
        model: Any module; frozen parameters and those on the meta device get a role too.

    Returns:
        The roles with their reasons, a mapping from the names of `model.named_parameters()`.

    Raises:
        StructPrecondError: If a lazy module has not seen its first input.

    Example:
        >>> print(infer_roles(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2))))
        parameter  shape  role       reason
        ----------------------------------------------------------------------
        0.weight   9x4    embedding  weight of Embedding
        1.weight   4x4    matrix     weight of Linear
        1.bias     4      bias       bias of Linear
        2.weight   2x4    head       last linear layer outside repeated blocks
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
    root = _Node("", "", model, repeated=isinstance(model, _BLOCKS))
    nodes = list(_walk(root, set()))
    sites: dict[nn.Parameter, list[_Site]] = {}  # by identity: the places of a tied parameter
    for node in nodes:
        for name, p in node.module.named_parameters(recurse=False, remove_duplicate=False):
            site = _site(node, name)
            if is_lazy(p):
                raise StructPrecondError(
                    f"Parameter {site.full} of {type(node.module).__name__} has no shape yet; run "
                    "one forward pass before its role is asked for."
                )
            sites.setdefault(p, []).append(site)
    tied = {p: reason for p, places in sites.items() if (reason := _tie(places))}
    heads = _heads(nodes, tied=bool(tied))
    roles = Roles()
    for p, places in sites.items():
        found = [_role(site, p, heads) for site in places]
        # A weight that two linear layers share is a head if one of them is.
        role = next((r for r in found if r.role == "head"), found[0])
        role = Role("head", tied[p]) if p in tied else role
        roles[places[0].full] = role._replace(shape=tuple(p.shape))
    return roles


# --- names ---------------------------------------------------------------------------------------

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_HEAD = re.compile(
    r"((?!pre_)(\w+_)?(heads?|classifiers?|logits?)|unembed(ding)?|embed_out|scores?|head_dist"
    r"|output_(projection|layer)|proj_out|qa_outputs|seq_relationship)(_?\d+)?"
)
_EMBEDDING = re.compile(
    r"(\w+_)?(embs?|embeds?|embeddings?|embed_positions|tokens?|tok|w[tp]e|pe|bias_table"
    r"|rel_pos(_[hw])?|pos(ition(al)?)?_enc(odings?)?)(_?\d+)?"
)
_NORM = re.compile(r"\w*norm\w*|(\w+_)?(ln|bn|gn)(_?[\df])?")
_BIAS = re.compile(r"bias(es)?(_\w+)?|\w+_bias(es)?")
_QKV = re.compile(r"\w*qkv\w*|c_attn|w_pack|query_key_value")
_EXPERTS = re.compile(r"\w*(expert|moe)\w*")
_EXPERT_BIAS = re.compile(r"b\d*|\w*bias\w*")
_ATTENTION = re.compile(r"\w*(attn|attention)\d*")
_LOGARITHM = re.compile(r"log_\w+|\w+_logs?")  # of time scales in state space models, mostly
# Says nothing, but the name of its module may.
_ANY = re.compile(r"w|weights?|bias|kernel|scale|gamma|beta|\d+")
# Linear layers that may come last though they lead into the model, to its side, or from one space
# to another. A projection that is said to lead out may well be the head.
_ASIDE = re.compile(
    r"\w*(pool|embed|expert|modulation|adaln)\w*|(\w+_)?(emb|gate|router|in|input|stem)"
    r"|(in|input|stem|time|cond)_\w+|\w+(?<!out)(?<!output)(?<!final)_proj(ection)?"
)


@lru_cache(maxsize=4096)
def _says(pattern: re.Pattern[str], *names: str) -> bool:
    return any(pattern.fullmatch(name.lower()) for name in names)


def _kind(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Parametrized")


# --- classes -------------------------------------------------------------------------------------

_RNNS = (nn.RNNBase, nn.RNNCellBase)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
_BLOCKS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_PLAIN = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer; `Conv1D` is how GPT-2 calls one with a transposed weight."""
    return isinstance(module, nn.Linear) or _kind(module).endswith(("Linear", "Conv1D"))


def _is_embedding(module: nn.Module) -> bool:
    named = _kind(module).endswith("Embedding") and not isinstance(module, nn.Linear)
    return named or isinstance(module, nn.Embedding | nn.EmbeddingBag)


def _is_norm(module: nn.Module) -> bool:
    kind = _kind(module)
    named = "Norm" in kind and not kind.endswith(("MLP", "Block", "Attention"))
    known = _is_linear(module) or _is_embedding(module) or isinstance(module, _ConvNd)
    return isinstance(module, _NORMS) or (named and not known)


# --- the module graph ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Node:
    """A module and its place in the model."""

    path: str
    name: str
    module: nn.Module
    parent: _Node | None = None
    repeated: bool = False  # in one of several alike blocks
    attention: bool = False  # in an attention layer
    aside: bool = False  # in something that is not on the way to the output
    head: str | None = None  # the path of what is named like a head and contains it


class _Site(NamedTuple):
    """A place where a parameter is registered: under which name in which module."""

    full: str
    node: _Node
    name: str
    magnitude: bool = False  # of weight normalization


def _unwrap(path: str, module: nn.Module) -> tuple[str, nn.Module]:
    """Skip the modules that DistributedDataParallel, compile and the like put around another."""
    while len(module._modules) == 1 and not module._parameters:
        ((name, inner),) = module._modules.items()
        if name not in _WRAPPERS or inner is None:
            break
        path, module = _join(path, name), inner
    return path, module


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _walk(node: _Node, seen: set[nn.Module]) -> Iterator[_Node]:
    """Yield every module once, in the order of `named_modules`."""
    if node.module in seen:
        return
    seen.add(node.module)
    yield node
    children = [
        (name, *_unwrap(_join(node.path, name), module))
        for name, module in node.module.named_children()
    ]
    blocks = _blocks(node.module, [(name, module) for name, _, module in children])
    # Several heads in a list or dict: each has a last layer.
    heads = node.head == node.path and isinstance(node.module, nn.ModuleList | nn.ModuleDict)
    for name, path, module in children:
        named = heads or _says(_HEAD, name)
        attention = node.attention or _says(_ATTENTION, name, _kind(module))
        repeated = node.repeated or (name in blocks and not named)
        first = heads or node.head is None
        head = path if named and first and not (repeated or attention) else node.head
        aside = node.aside or _says(_ASIDE, name)
        yield from _walk(_Node(path, name, module, node, repeated, attention, aside, head), seen)


def _blocks(parent: nn.Module, children: list[tuple[str, nn.Module]]) -> set[str]:
    """Return which children are repeated blocks: alike but for a number in their names.

    An encoder and a decoder are none, even of the same class. A list may have a single block.
    """
    alike: dict[object, list[str]] = {}
    found: set[str] = set()
    for name, module in children:
        if _is_linear(module) or not module._modules or next(module.parameters(), None) is None:
            continue
        plain = type(module) in _PLAIN  # such containers are alike if their contents are
        content = tuple(type(m) for m in module.children()) if plain else ()
        alike.setdefault((re.sub(r"\d+", "0", name), type(module), content), []).append(name)
        if (isinstance(parent, nn.ModuleList) and not plain) or isinstance(module, _BLOCKS):
            found.add(name)
    return found.union(*(names for names in alike.values() if len(names) > 1))


def _site(node: _Node, name: str) -> _Site:
    """Attribute what stands in for a parameter (parametrized, pruned) to the layer it is of."""
    full = _join(node.path, name)
    if isinstance(node.module, ParametrizationList) and node.parent and node.parent.parent:
        magnitude = name == "original0" and "_WeightNorm" in map(_kind, node.module)
        return _Site(full, node.parent.parent, node.name, magnitude)
    base, _, suffix = name.rpartition("_")
    if suffix in ("orig", "v", "g") and base in vars(node.module):
        return _Site(full, node, base, magnitude=suffix == "g")
    return _Site(full, node, name)


# --- rules ---------------------------------------------------------------------------------------


def _tie(sites: list[_Site]) -> str | None:
    """Return why a parameter is a tied head, if it is one."""
    embeddings = [s.node.path for s in sites if _is_embedding(s.node.module)]
    linears = [s.node.path for s in sites if _is_linear(s.node.module)]
    if not (embeddings and linears):
        return None
    return f"tied: embedding {embeddings[0]} and linear layer {linears[0]}"


def _heads(nodes: list[_Node], tied: bool) -> dict[nn.Module, str]:
    """Return the linear layers that are heads, and why."""
    linears = [n for n in nodes if _is_linear(n.module) and not (n.repeated or n.attention)]
    possible = set(linears)
    inside = [n for n in nodes if n.head is not None]
    last = {n.head: n for n in inside if n in possible or _is_norm(n.module)}
    # What is named a head but ends in a norm transforms features for a head behind it.
    transforms = {path for path, n in last.items() if _is_norm(n.module)}
    # A backbone without its head has an identity there, a fully convolutional one a convolution.
    replaced = any(
        n.head not in transforms and (n.module._parameters or isinstance(n.module, nn.Identity))
        for n in inside
    )
    bare = any(
        not n.repeated and _says(_HEAD, name) for n in nodes for name in n.module._parameters
    )
    if tied or replaced or bare:
        named = ((n.module, path) for path, n in last.items() if path not in transforms)
        return {module: f"linear layer named {path}" for module, path in named}
    final = [n.module for n in linears if not n.aside][-1:]
    return dict.fromkeys(final, "last linear layer outside repeated blocks")


def _role(site: _Site, p: nn.Parameter, heads: dict[nn.Module, str]) -> Role:
    """Ask the module first, then names, then the shape."""
    if site.magnitude:
        return Role("other", f"magnitude of a weight of {_kind(site.node.module)}")
    return _by_module(site, p, heads) or _by_name(site, p) or _by_shape(site, p)


def _by_module(site: _Site, p: nn.Parameter, heads: dict[nn.Module, str]) -> Role | None:
    node, module, kind = site.node, site.node.module, _kind(site.node.module)
    listed = isinstance(module, nn.ParameterList | nn.ParameterDict)
    owners = (node.parent.name, _kind(node.parent.module)) if listed and node.parent else ()
    known = type(module).__module__.startswith("torch.nn.")
    known = known or _is_linear(module) or isinstance(module, _ConvNd)
    if _is_norm(module):
        return Role("norm", f"{site.name} of {kind}")
    if _says(_BIAS, site.name) and (known or not _says(_NORM, node.name)):
        return Role("bias", f"bias of {kind}")
    if isinstance(module, _ConvNd) and site.name == "weight":
        return Role("conv", f"{site.name} of {kind}")
    if _is_embedding(module) and p.ndim > 1:
        return Role("embedding", f"{site.name} of {kind}")
    if p.ndim > 2 and _says(_EXPERTS, site.name, node.name, kind, *owners):
        return Role("experts", f"many experts in one {site.name} of {kind}")
    if p.ndim == 2 and _says(_EXPERT_BIAS, site.name) and _says(_EXPERTS, node.name, kind, *owners):
        return Role("bias", f"a vector per expert of {kind}")
    if p.ndim != 2:
        return None
    if isinstance(module, nn.MultiheadAttention) and site.name == "in_proj_weight":
        return Role("fused_qkv", f"{site.name} of {kind}")
    if isinstance(module, (nn.MultiheadAttention, *_RNNS)):
        return Role("matrix", f"{site.name} of {kind}")
    if not _is_linear(module):
        return None
    if module in heads:
        return Role("head", heads[module])
    inputs, outputs = p.shape if kind.endswith("Conv1D") else p.shape[::-1]
    in_proj = node.name == "in_proj" and node.attention
    if (in_proj or _says(_QKV, node.name)) and outputs > inputs:
        return Role("fused_qkv", f"linear layer named {node.name}, longer along its outputs")
    expert = ", of one expert" if "expert" in node.path.lower() else ""
    return Role("matrix", f"{site.name} of {kind}{expert}")


def _by_name(site: _Site, p: nn.Parameter) -> Role | None:
    """Look at the name of a parameter of an unknown class, or of its module if it says more."""
    node, name = site.node, site.name.removesuffix("_weight")
    listed = isinstance(node.module, nn.ParameterList | nn.ParameterDict)
    for word in (name, *([node.name] if listed or _says(_ANY, name) else [])):
        # A custom layer called an embedding may well be a convolution of patches.
        if _says(_EMBEDDING, word) and (word == name or listed or p.ndim == 2):
            return Role("embedding", f"named {word}")
        if _says(_LOGARITHM, word):
            return Role("other", f"named {word}, the logarithm of something")
        if _says(_NORM, word):
            return Role("norm", f"named {word}")
        if _says(_HEAD, word) and p.ndim == 2 and not (node.repeated or node.attention):
            return Role("head", f"named {word}")
        if _says(_QKV, word) and p.ndim == 2 and p.shape[0] != p.shape[1]:
            return Role("fused_qkv", f"named {word}, longer along one axis")
    return None


def _by_shape(site: _Site, p: nn.Parameter) -> Role:
    vector = sum(size != 1 for size in p.shape) < 2
    if p.ndim == 2 and not vector:
        return Role("matrix", f"two axes, in {_kind(site.node.module)}")
    if p.ndim in (4, 5) and not vector:
        return Role("conv", f"by its shape, in {_kind(site.node.module)}")
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", site.full)
    axes = "a vector or scalar" if vector else f"{p.ndim} axes"
    return Role("other", f"{axes}, in {_kind(site.node.module)}; to change it, match {pattern!r}")
