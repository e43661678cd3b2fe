"""Imports the examples of trainers, where their packages are installed."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from tests.roles.architectures.table import package


def example(name: str, needs: str) -> Any:
    """Return an example; skip the test if the package that it needs is not installed."""
    package(needs)
    return importlib.import_module(f"integrations.{name}")


def assert_equal(one: Any, other: Any) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
