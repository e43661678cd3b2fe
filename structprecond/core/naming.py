"""Names of parameters, independent of wrappers around the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from structprecond.structures.spec import Structure

_COMPILED = "_orig_mod"
_MOST_NAMES = 5


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside data-parallel and `torch.compile` wrappers."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif _COMPILED in model._modules:
            model = model.get_submodule(_COMPILED)
        else:
            return model


def plain_name(name: str) -> str:
    """Return a parameter's name without the parts that `torch.compile` adds."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def enumerate_names(names: Sequence[str]) -> str:
    """Return the first few names and the number of the others."""
    rest = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def describe_shape(shape: Sequence[int]) -> str:
    """Return a shape as in "64x32x3"."""
    return "x".join(map(str, shape))


def names_of_structures(structures: Sequence[Structure]) -> tuple[str, ...]:
    """Return the names by which `structures=` knows them."""
    return tuple("none" if s is None else s.name for s in structures)


class BareParameters(nn.Module):
    """A stand-in for the model if only parameters are known; their names define its modules.

    Args:
        names: The parameters, which may be plain tensors, and their names.
    """

    def __init__(self, names: Mapping[Any, str]) -> None:
        super().__init__()
        for p, name in names.items():
            *path, own = name.split(".")
            module: nn.Module = self
            for part in path:
                module = module._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
            while own in module._parameters:
                own += "_"  # the user's names may repeat
            # register_parameter refuses plain tensors
            module._parameters[own] = p
