"""The code blocks of the README and the documentation run, in their order on the page."""

import doctest
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import structprecond
from structprecond import SAM, SOAP, AdamW

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

BLOCK = re.compile(
    r"(?:<!-- runs in: (?P<file>\S+) -->\n)?^```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE
)
"""Blocks that need several processes, a GPU or another package name the file that runs the same."""


def blocks_of(page):
    return list(BLOCK.finditer(page.read_text(encoding="utf-8")))


def usual_names():
    """Return what a reader has at hand: the library, torch, a model, data and an optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    inputs, targets = torch.randn(8, 16), torch.randint(10, (8,))
    names = {name: getattr(structprecond, name) for name in structprecond.__all__}
    return names | {
        "torch": torch,
        "nn": nn,
        "model": model,
        "optimizer": SOAP(model),
        "sam": SAM(model, AdamW, lr=0.01),
        "loss": nn.functional.cross_entropy,
        "scaler": torch.amp.GradScaler("cpu"),
        "folder": "checkpoint",
        "batches": [(inputs, targets)] * 2,
        "x": inputs,
        "y": targets,
    }


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p)], ids=lambda page: page.stem)
def test_code_blocks_run(page, tmp_path, monkeypatch, capsys):
    names = usual_names()
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(blocks_of(page)):
        code, file = block["code"], block["file"]
        if file:
            assert (ROOT / file).is_file(), f"{page.name} names {file}, which does not exist"
        elif code.lstrip().startswith(">>>") or "\n>>> " in code:
            test = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), 0)
            assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0
        else:
            exec(compile(code, f"{page.name}, block {number}", "exec"), names)


def test_the_readme_has_a_snippet_of_at_most_12_lines_that_trains():
    code = blocks_of(ROOT / "README.md")[0]["code"]
    assert len(code.strip().splitlines()) <= 12
    names: dict[str, object] = {}
    exec(code, names)
    assert float(names["loss"].item()) < 2.3  # type: ignore[attr-defined]  # log 10 is chance
