"""A user's file under `mypy --strict`: what is right passes, and each mistake is an error."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

USER = """
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from structprecond import (
    RECOMMENDED, SAM, SOAP, CapRMS, CautiousDecay, Diagnostics, Hyperparameter, LinearWeightBias,
    MatchRMS, Muon, SIRFShampoo, State, StepContext, Strategy, StructuredOptimizer, describe,
    estimate, load_adamw, recommend,
)
from structprecond.structures.spec import Structure

model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
optimizer = SOAP(model, lr=0.01, structures={2: ("dense", "block4diagonal")}, refresh="staggered")
Muon(model, **RECOMMENDED["Muon"])
Muon(model, routes={"head": "soap"}, policies=(MatchRMS(0.2), CautiousDecay()))
SIRFShampoo(model, batch_size=8, combine_params=[LinearWeightBias()])
SOAP([{"params": list(model.parameters()), "lr": 0.1}], policies={"soap": (CapRMS(1.0),)})
print(describe(optimizer).state_bytes + estimate(model, SOAP).state_bytes)
choice = recommend(model, memory="2GiB", goal="steps")
made: StructuredOptimizer = choice(model)
names: list[str] = load_adamw(made, torch.optim.AdamW(model.parameters()).state_dict())


def closure() -> float:
    optimizer.zero_grad()
    loss = model(torch.ones(2, 4)).sum()
    loss.backward()
    return float(loss)


value: float = optimizer.step(closure)
SAM(None, optimizer).step(closure)
with Diagnostics(optimizer, every=5, log=lambda numbers, step: print(step, numbers)) as watched:
    optimizer.step(closure)
    seconds: float = watched.latest.seconds


@dataclass
class Mean(State):
    mean: Tensor


@dataclass(frozen=True)
class Heavy(Strategy[Mean]):
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "lr": Hyperparameter(0.1, lambda v: v >= 0, "at least 0")
    }
    structures = ()

    def init(
        self, like: Tensor, structures: tuple[Structure, ...], dtypes: tuple[torch.dtype, ...]
    ) -> Mean:
        return Mean(torch.zeros_like(like))

    def update(self, state: Mean, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext) -> Tensor:
        return state.mean.mul_(0.9).add_(grad)


StructuredOptimizer(model, strategy=Heavy())
"""

MISTAKES = """
from torch import nn
from structprecond import SOAP, Muon, Diagnostics, recommend

model = nn.Linear(4, 8)
SOAP(model, learning_rate=0.01)  # wrong
SOAP(model, lr="fast")  # wrong
SOAP(model, refresh="sometimes")  # wrong
Muon(model, nesterov="yes")  # wrong
recommend(model, goal="loss")  # wrong
Diagnostics(SOAP(model), log=5)  # wrong
"""


def check(code: str, folder: Path) -> tuple[int, str]:
    """Check a file with the settings of this repository, which are strict, and its warm cache."""
    file = folder / "user.py"
    file.write_text(code)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_users_file_passes_strict_checks(tmp_path: Path) -> None:
    code, output = check(USER, tmp_path)
    assert code == 0, output


def test_each_mistake_is_an_error_on_its_line(tmp_path: Path) -> None:
    code, output = check(MISTAKES, tmp_path)
    assert code == 1
    wrong = [i for i, line in enumerate(MISTAKES.split("\n"), 1) if line.endswith("# wrong")]
    assert sorted({int(n) for n in re.findall(r"user\.py:(\d+): error", output)}) == wrong
    assert 'Unexpected keyword argument "learning_rate"' in output
