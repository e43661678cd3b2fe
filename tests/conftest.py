"""Settings of all tests."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

_QUIET = [HealthCheck.differing_executors, HealthCheck.too_slow]
settings.register_profile("default", max_examples=15, deadline=None, suppress_health_check=_QUIET)
settings.register_profile("nightly", max_examples=500, deadline=None, suppress_health_check=_QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Let every test draw the same random numbers, alone or among others."""
    torch.manual_seed(0)
