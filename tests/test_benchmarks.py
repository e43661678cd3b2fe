"""The benchmarks run, shortened, and their figures mean what they say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import step_time
import torch
import workloads
from torch import nn

from structprecond import SIRFShampoo


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A workload of a few small matrices."""
    model = lambda: nn.ModuleList(nn.Linear(6, 4) for _ in range(3))  # noqa: E731
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", model)
    threads = torch.get_num_threads()
    yield "tiny"
    torch.set_num_threads(threads)


def test_comparison_with_itself_finds_the_same_updates(tiny: str) -> None:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        return SIRFShampoo(model, batch_size=4, lr=0.1)

    result = step_time.compare(tiny, "itself", build, build, rounds=3)
    assert result.error == 0.0
    assert 0.05 < result.ratio < 20
    assert result.ours > 0


def test_comparison_shows_a_different_update(tiny: str) -> None:
    result = step_time.compare(
        tiny,
        "other damping",
        lambda model: SIRFShampoo(model, batch_size=4, lr=0.1, beta2=0.1),
        lambda model: SIRFShampoo(model, batch_size=4, lr=0.1, beta2=0.2),
        rounds=1,
    )
    assert result.error > 1e-3


def test_tables_and_json(tiny: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "times.json"
    arguments = ["--workload", tiny, "--structures", "--cycles", "2", "--json", str(out)]
    results = step_time.main([*arguments, "--threads", "1"])
    names = ["synchronous", "staggered"]
    assert [r.name for r in results] == names
    assert all(r.worst >= r.mean > 0 for r in results if isinstance(r, step_time.Cycle))
    assert [entry["name"] for entry in json.loads(out.read_text())] == names
    assert "| tiny | staggered |" in capsys.readouterr().out


def test_gradients_depend_on_the_seed_alone() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    workloads.fill_gradients(first, seed=1)
    workloads.fill_gradients(second, seed=1)
    assert first.weight.grad is not None
    assert torch.equal(first.weight.grad, second.weight.grad)  # type: ignore[arg-type]
    workloads.fill_gradients(second, seed=2)
    assert not torch.equal(first.weight.grad, second.weight.grad)  # type: ignore[arg-type]
