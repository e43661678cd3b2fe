"""What `describe` says where rows have owners."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from structprecond import SOAP, Muon, describe
from structprecond.core.report import Row
from tests.distributed import layouts, pool


def state_of(optimizer: Any) -> int:
    """Return the bytes of all state that this rank has allocated."""
    return sum(t.nbytes for b in optimizer.buckets for t in b.named_tensors().values())


def owned_by(optimizer: Any) -> set[str]:
    return {unit.label for bucket in optimizer.buckets for unit in bucket.units}


def described(rank: int, make: Any, layout: str) -> tuple[str, str, list[int], Any]:
    model: Any = layouts.LAYOUTS[layout](layouts.mlp())
    model[4].requires_grad_(False)
    mesh: Any = dist.group.WORLD if layout == "replicated" else None
    optimizer = make(model, mesh=mesh)
    found = describe(optimizer)

    # what ranks hold, as they say
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (state_of(optimizer), owned_by(optimizer)))
    sizes = [size for size, _ in everywhere]
    owners = {
        row.names: tuple(r for r, (_, own) in enumerate(everywhere) if own & set(row.names))
        for row in found.rows
    }
    right = all(row.owners == owners[row.names] for row in found.rows)
    right &= [rank.state_bytes for rank in found.ranks] == sizes
    right &= found.state_bytes == sum(sizes)
    right &= abs(sum(rank.work for rank in found.ranks) - 1) < 1e-9

    def rest(rows: tuple[Row, ...]) -> set[Any]:
        return {(r.strategy, r.names, r.rows, r.state_bytes, r.live, r.weight_decay) for r in rows}

    whole: Any = layouts.mlp()
    whole[4].requires_grad_(False)
    alone = describe(make(whole))
    right &= rest(alone.rows) == rest(found.rows)
    right &= alone.parameter_bytes == found.parameter_bytes
    return str(found), found.by_parameter(), sizes, right


@pytest.mark.parametrize("layout", ["fsdp", "replicated"])
@pytest.mark.parametrize("make", [SOAP, Muon])
def test_all_ranks_describe_what_all_of_them_own(make: Any, layout: str) -> None:
    (text, roles, sizes, right), (other, other_roles, _, other_right) = pool.run(
        2, described, make, layout
    )
    assert right
    assert other_right
    assert (text, roles) == (other, other_roles)
    share = max(sizes) / sum(sizes)
    assert "of 2 ranks" in text
    assert f"of state {share:.2f} ({max(sizes) / 1024:.1f} KiB)" in text


def describe_square(rank: int) -> str:
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(5)))
    return str(describe(SOAP(model, mesh=dist.group.WORLD)))


def test_owners_and_the_largest_shares_are_in_the_table() -> None:
    for text in pool.run(2, describe_square):
        header, _, row, *_, last = text.splitlines()
        assert header.split()[-1] == "owners"
        assert row.split()[-1] == "0-1"
        # three of five equal units
        assert last.startswith("largest share of work 0.60 of 2 ranks, of state 0.60 (")


def says(rank: int, mesh: bool) -> str:
    group: Any = dist.group.WORLD if mesh else None
    with redirect_stdout(StringIO()) as said:
        SOAP(layouts.fsdp(layouts.mlp()), mesh=group, verbose_init=True)
    return said.getvalue()


@pytest.mark.parametrize("mesh", [True, False])
def test_the_first_rank_prints_for_all(mesh: bool) -> None:
    first, second = pool.run(2, says, mesh)
    assert first.count("of 2 ranks") == 1
    assert second == ""


def thawed(rank: int) -> tuple[bool, bool]:
    model: Any = layouts.fsdp(layouts.mlp())
    model[2].requires_grad_(False)
    optimizer = SOAP(model)
    before = describe(optimizer)
    model.requires_grad_(True)
    layouts.set_grads(model, 0)
    optimizer.step()
    after = describe(optimizer)
    row = next(row for row in before.rows if "2.weight" in row.names)
    sizes = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
    dist.all_gather(sizes, torch.tensor(state_of(optimizer)))
    right = [share.state_bytes for share in after.ranks] == [int(size) for size in sizes]
    return not row.live and row.owners == () and row.state_bytes == 0, right


def test_frozen_units_have_no_owner_until_they_are_thawed() -> None:
    assert pool.run(2, thawed) == [(True, True)] * 2
