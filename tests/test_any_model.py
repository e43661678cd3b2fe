"""Defaults are affordable on models with long axes, and the benchmarks of that measure it."""

from __future__ import annotations

import any_model
import auto_structures
import pytest
import torch

from structprecond import SOAP, AdamW, describe
from structprecond.structures import auto


@pytest.mark.parametrize("name", any_model.CASES)
def test_state_is_at_most_16_times_the_parameters(name: str) -> None:
    with torch.device("meta"):
        model = any_model.CASES[name].make()
    description = describe(SOAP(model))
    assert description.state_bytes <= 16 * description.parameter_bytes


def test_the_efficientnet_is_b0() -> None:
    with torch.device("meta"):
        model = any_model.efficientnet()
    # as in torchvision
    assert sum(p.numel() for p in model.parameters()) == 5_288_548


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", any_model.OPTIMIZERS)
@pytest.mark.parametrize("name", any_model.CASES)
def test_every_default_takes_less_than_a_minute(name: str, optimizer: str) -> None:
    result = any_model.measure(any_model.CASES[name], any_model.OPTIMIZERS[optimizer])
    # of two threads; their time does not depend on what else the machine does
    assert result.cpu_seconds < 2 * 60


def test_time_and_state_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    case = any_model.CASES["weight norm 7200->16"]
    result = any_model.measure(case, AdamW, steps=2)
    assert 0 < result.seconds < 60
    assert result.state == pytest.approx(2, abs=0.01)
    threads = str(torch.get_num_threads())
    arguments = ["--models", "weight norm 7200->16", "--optimizers", "AdamW", "--steps", "1"]
    any_model.main([*arguments, "--threads", threads])
    header, _, line = capsys.readouterr().out.splitlines()
    assert header.split() == "| model | weight norm 7200->16 |".split()
    assert line.split()[:3] == ["|", "AdamW", "|"]
    assert line.split()[-2:] == ["2.0x", "|"]


def test_limits_of_auto_are_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(auto_structures, "WIDTHS", (64, 40, 10))
    before = auto.THIN, auto.LONG
    arguments = ["--jobs", "digits", "--limits", "2,8", "4,40", "--steps", "3", "--seeds", "2"]
    auto_structures.main([*arguments, "--threads", str(torch.get_num_threads())])
    assert before == (auto.THIN, auto.LONG)
    lines = capsys.readouterr().out.splitlines()[5:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[1] for row in cells] == ["dense", "8,1024 (default)", "2,8", "4,40"]
    # 10x40: 40 is more than twice, but not more than four times as long as the other axis
    assert [row[2] for row in cells] == ["0", "0", "1", "0"]
    # what leaves out the same factors is the same run
    assert cells[0][3:] == cells[1][3:] == cells[3][3:]
    assert cells[0][3:] != cells[2][3:]
    # two factors and bases of 1600 numbers less, beside 64x40 and 40x10 weights and 50 biases
    parameters = 64 * 40 + 40 * 10 + 50
    saved = float(cells[0][6]) - float(cells[2][6])
    assert saved == pytest.approx(2 * 40**2 / parameters, abs=0.1)
