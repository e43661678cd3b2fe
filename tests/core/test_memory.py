"""Steps take the memory that earlier steps have freed."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# temporaries of 16 MB, several of them at once: more than glibc keeps by itself
SCRIPT = """
import resource
import torch
from torch import nn
from structprecond import AdamW

models = [nn.Linear(2048, 2048, bias=False) for _ in range(8)]
optimizer = AdamW(nn.ModuleList(models))
faults = []
for _ in range(6):
    for model in models:
        model.weight.grad = torch.ones(2048, 2048)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    optimizer.step()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[2:]), resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's malloc")
def test_steps_take_no_new_memory() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    faults, page = map(int, run.stdout.split())
    # one temporary of one stack
    assert faults * page < 2**24
