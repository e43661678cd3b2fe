"""Every example runs, shortened, and reduces its loss."""

from __future__ import annotations

import basic
import custom_group
import mixed
import param_groups
import pytest
import resume
import vision


@pytest.mark.parametrize(
    ("example", "steps"), [(basic, 60), (param_groups, 60), (custom_group, 60), (mixed, 60)]
)
def test_example_learns(example, steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    losses = example.main(["--steps", str(steps)])
    assert len(losses) == steps
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert f"step {steps - 1:4d}" in capsys.readouterr().out


def test_vision_recognizes_most_digits(capsys: pytest.CaptureFixture[str]) -> None:
    losses, accuracy = vision.main(["--steps", "30"])
    assert len(losses) == 30
    assert accuracy > 0.8
    assert "accuracy on 360 other digits" in capsys.readouterr().out


def test_resume_ends_with_the_same_bits() -> None:
    assert resume.main(["--steps", "10"])
