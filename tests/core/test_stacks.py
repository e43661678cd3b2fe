"""Units are cut into stacks, large ones into several, without effect on results."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from structprecond import SOAP, AdamW, SIRFShampoo, StackExperts
from structprecond.core import build
from tests.helpers import assert_close, values


def _rows(model: nn.Module, structures: str = "dense", **kwargs: object) -> list[int]:
    optimizer = SOAP(model, structures=structures, **kwargs)  # type: ignore[arg-type]
    return [bucket.rows for bucket in optimizer.buckets]


@pytest.mark.parametrize(
    ("shape", "count", "expected"),
    [
        # 2^22 entries, of the tensors or of their largest factors
        ((512, 512), 20, [16, 4]),
        ((1024, 256), 7, [4, 3]),
        ((256, 1024), 7, [4, 3]),
        ((2100, 2), 2, [1, 1]),
        ((8, 8), 300, [300]),
    ],
)
def test_stacks_of_large_tensors_are_short(
    shape: tuple[int, int], count: int, expected: list[int]
) -> None:
    model = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for _ in range(count))
    assert _rows(model) == expected


def test_only_factors_that_are_there_count() -> None:
    norms = nn.ModuleList(nn.LayerNorm(1500) for _ in range(5))
    assert [bucket.rows for bucket in AdamW(norms).buckets] == [10]
    assert _rows(norms) == [10]
    assert _rows(norms, precondition_1d=True) == [1] * 10
    assert _rows(norms, precondition_1d=True, structures="diagonal") == [10]


@pytest.mark.parametrize(
    ("structure", "entries"),
    [
        ("dense", 64**2),
        ("block30diagonal", 2 * 30**2 + 4**2),
        ("hierarchical15_15", 2 * 15**2 + 15 * 49 + 15 * 34 + 34),
        ("triltoeplitz", 64),
    ],
)
def test_factors_count_with_what_they_store(
    structure: str, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_MOST_ENTRIES", 2**14)
    model = nn.ParameterList(nn.Parameter(torch.zeros(64, 2)) for _ in range(150))
    optimizer = SIRFShampoo(model, structures={2: (structure, "diagonal")}, batch_size=8)
    assert optimizer.buckets[0].rows == 2**14 // max(entries, 64 * 2)


def test_the_rows_of_one_unit_stay_together() -> None:
    experts = nn.ParameterDict({f"e{i}": nn.Parameter(torch.zeros(3, 1024, 256)) for i in range(3)})
    assert _rows(experts, combine_params=(StackExperts("e*"),)) == [3, 3, 3]


def test_cut_stacks_train_as_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList(nn.Linear(5, 6) for _ in range(7)).double()
    twin = copy.deepcopy(model)
    whole = SOAP(twin, precondition_frequency=2)
    monkeypatch.setattr(build, "_MOST_ENTRIES", 3 * 36)
    cut = SOAP(model, precondition_frequency=2)
    assert [bucket.rows for bucket in cut.buckets] == [3, 3, 1, 7]
    assert len(whole.buckets) == 2
    for _ in range(5):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        cut.step()
        whole.step()
    assert_close(values(model), values(twin), 1e-9)
    # and each loads the other's checkpoint
    cut.load_state_dict(whole.state_dict())
    whole.load_state_dict(cut.state_dict())
