"""Settings of all tests, and the names that the examples in docstrings may use."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

import structprecond

_QUIET = [HealthCheck.differing_executors, HealthCheck.too_slow]
settings.register_profile("default", max_examples=15, deadline=None, suppress_health_check=_QUIET)
settings.register_profile("nightly", max_examples=500, deadline=None, suppress_health_check=_QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_finish() -> None:
    """Let Python's garbage collector look at what the tests make, and at nothing older."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Let every test draw the same random numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _names_in_docstrings(doctest_namespace: dict[str, Any]) -> None:
    """Spare every example the same imports."""
    doctest_namespace |= {"torch": torch, "nn": nn, "Tensor": torch.Tensor}
    doctest_namespace |= {name: getattr(structprecond, name) for name in structprecond.__all__}
