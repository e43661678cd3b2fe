"""KL-Shampoo and KL-SOAP against recorded trajectories and dense formulas."""

from __future__ import annotations

import pytest

import structprecond
from tests import golden


@pytest.mark.parametrize("name", golden.names("kl"))
def test_reproduces_the_published_trajectory(name: str) -> None:
    recorded = golden.load(name)
    model = recorded.model()
    kwargs = recorded.kwargs
    kwargs.pop("using_klsoap", None)
    if "using_clamping" in kwargs:
        kwargs["clamping"] = kwargs.pop("using_clamping")
    make = getattr(structprecond, recorded.meta["optimizer"])
    assert recorded.replay(model, make(model.parameters(), **kwargs)) < 1e-4
