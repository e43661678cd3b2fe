"""What parameters are called, whatever is wrapped around the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_COMPILED = "_orig_mod"
_MOST_NAMES = 5


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside of data parallelism and `torch.compile`."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif _COMPILED in model._modules:
            model = model.get_submodule(_COMPILED)
        else:
            return model


def plain_name(name: str) -> str:
    """Return a parameter's name without what compiling parts of the model adds."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def enumerate_names(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    rest = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


class BareParameters(nn.Module):
    """Stands in for the model where only parameters are known, with modules as their names say.

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
                own += "_"  # names of the user may be alike
            # not registered as usual, which takes no plain tensors
            module._parameters[own] = p
