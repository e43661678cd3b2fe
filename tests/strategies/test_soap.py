"""SOAP against recorded trajectories, Adam, and itself in other coordinates."""

from __future__ import annotations

import pytest

from structprecond import SOAP
from tests import golden


@pytest.mark.parametrize("name", golden.names("soap_"))
def test_reproduces_the_published_trajectory(name: str) -> None:
    recorded = golden.load(name)
    model = recorded.model()
    kwargs = recorded.kwargs
    if "betas" in kwargs:
        kwargs["betas"] = tuple(kwargs["betas"])
    optimizer = SOAP(model.parameters(), **kwargs)
    assert recorded.replay(model, optimizer) < 1e-4
