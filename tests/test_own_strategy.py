"""The example's own strategy passes the tests of all strategies."""

from __future__ import annotations

import ast
from pathlib import Path

import own_strategy
import pytest
import torch
from torch import nn

from structprecond.testing.table import Usage

TestLion = Usage(own_strategy.Lion, {"lr": 0.01, "weight_decay": 0.1}).contract()


def test_steps_follow_the_published_rule() -> None:
    p = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    optimizer = own_strategy.Lion([p], lr=0.1, betas=(0.8, 0.6), weight_decay=0.5)
    expected, momentum = p.detach().clone(), torch.zeros_like(p)
    for _ in range(5):
        grad = torch.randn_like(p)
        p.grad = grad.clone()
        optimizer.step()
        update = (0.8 * momentum + 0.2 * grad).sign()
        expected = expected - 0.1 * (update + 0.5 * expected)
        momentum = 0.6 * momentum + 0.4 * grad
        assert torch.allclose(p, expected, rtol=1e-12)


def test_it_takes_at_most_45_lines_of_code() -> None:
    source = Path(own_strategy.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source)
    lines: set[int] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            lines |= set(range(min([node.lineno, *(d.lineno for d in node.decorator_list)]),
                               (node.end_lineno or 0) + 1))  # fmt: skip
    for text in ast.walk(tree):
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            lines -= set(range(text.lineno, (text.end_lineno or 0) + 1))
    code = [line for i, line in enumerate(source.splitlines(), 1) if i in lines and line.strip()]
    assert 20 < len(code) <= 45


@pytest.mark.parametrize("steps", [60])
def test_the_example_learns(steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    losses = own_strategy.main(["--steps", str(steps)])
    assert len(losses) == steps
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert f"step {steps - 1:4d}" in capsys.readouterr().out
