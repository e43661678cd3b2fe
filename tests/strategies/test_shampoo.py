"""Shampoo against recorded trajectories and dense formulas."""

from __future__ import annotations

import pytest

from structprecond import Shampoo
from tests import golden


@pytest.mark.parametrize("name", golden.names("shampoo_"))
def test_reproduces_the_published_trajectory(name: str) -> None:
    recorded = golden.load(name)
    model = recorded.model()
    kwargs = recorded.kwargs
    kwargs["eps"] = kwargs.pop("epsilon")
    kwargs["betas"] = tuple(kwargs["betas"])
    kwargs["grafting"] = "adam" if recorded.meta["grafting"].startswith("adam") else None
    optimizer = Shampoo(model.parameters(), **kwargs)
    assert recorded.replay(model, optimizer) < 1e-6
