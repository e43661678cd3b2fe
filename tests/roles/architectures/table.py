"""The expected roles of an architecture's parameters, by patterns of their names."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import nn

from structprecond.roles import ROLES, infer_roles


@dataclass(frozen=True)
class Architecture:
    """A model without weights, and the roles of its parameters, written by hand.

    Args:
        make: The code that makes the model, in a package.
        roles: Lines of a role and patterns with shell wildcards; every parameter must match one
            pattern, and every pattern a parameter.
        settings: Keyword arguments of `make`.
    """

    make: str
    roles: str
    settings: dict[str, Any] = field(default_factory=dict)


def check(model: nn.Module, roles: str) -> None:
    patterns: dict[str, str] = {}
    for line in roles.strip().splitlines():
        role, *names = line.split()
        assert role in ROLES
        assert not patterns.keys() & set(names)
        patterns |= dict.fromkeys(names, role)
    used, wrong = set(), {}
    for name, found in infer_roles(model).items():
        matching = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        assert len(matching) == 1, f"{name} matches {matching}"
        used |= set(matching)
        if found.role != patterns[matching[0]]:
            wrong[name] = (f"{found.role}, because of {found.reason}", patterns[matching[0]])
    assert not wrong
    assert used == set(patterns), f"match nothing: {set(patterns) - used}"


def package(name: str) -> Any:
    """Return a package; skip the tests if it is not installed."""
    _declare_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def _declare_operators() -> None:
    """Let `torchvision` be imported if its compiled operators do not fit torch.

    Its models need none of them, but the import extends two.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("torchvision")
        except RuntimeError:  # the operator torchvision::nms does not exist
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
            for name in ("nms", "qnms"):
                torch.library.define(
                    f"torchvision::{name}",
                    "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                )
        except ImportError:
            pass


def on_meta(make: Callable[..., Any], **settings: Any) -> Any:
    """Make a model whose parameters have shapes but no memory."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return make(**settings)
