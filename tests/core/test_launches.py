"""The number of operations of a step does not depend on the number of equal layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.every_strategy import Make, every_strategy

# views and allocations launch no kernels; copies to and from parameters are one call for a list
_FREE = """
    alias as_strided detach diagonal empty empty_like empty_strided expand narrow new_empty
    new_empty_strided permute select slice split squeeze t transpose unbind unsqueeze view
    _reshape_alias _unsafe_view
""".split()
# a row's random numbers depend on its own seed alone, so that a resumed run draws the same ones
_PER_ROW = {"randn"}


class Launches(TorchDispatchMode):
    """Counts operations that compute or move numbers, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in _FREE:
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def launches(make: Make, layers: int) -> list[dict[str, int]]:
    """Return the counts of each of seven steps, refreshes among them."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(6, 5, bias=False) for _ in range(layers))
    optimizer, found = make(model), []
    for seed in range(7):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed + 100 * i))
        with Launches() as counted:
            optimizer.step()
        found.append(counted.counts)
    return found


@every_strategy
def test_launches_do_not_depend_on_the_number_of_equal_layers(make: Make) -> None:
    few, many = launches(make, 4), launches(make, 12)
    # the first step gives rows their turns and seeds, on the host
    for a, b in zip(few[1:], many[1:], strict=True):
        names = (a | b).keys() - _PER_ROW
        assert {name: a.get(name) for name in names} == {name: b.get(name) for name in names}


def test_the_count_notices_a_loop_over_layers() -> None:
    def make(model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)

    few, many = (launches(make, layers)[1]["add_"] for layers in (4, 12))
    assert (few, many) == (4, 12)
