"""Steps take the memory that earlier steps have freed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# temporaries of 16 and of 40 MB, several of them at once: more than glibc keeps by itself
SCRIPT = """
import resource
import statistics
import torch
from torch import nn
from structprecond import AdamW

models = [nn.Linear(2048, 2048, bias=False) for _ in range(3)] + [nn.Linear(2048, 5120, bias=False)]
optimizer = AdamW(nn.ModuleList(models))
faults = []
for _ in range(8):
    for model in models:
        model.weight.grad = torch.ones_like(model.weight)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    optimizer.step()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median(faults[4:]), resource.getpagesize())
"""


def _new_memory(**variables: str) -> float:
    """Return the bytes that a step takes anew, in a process with environment variables."""
    command = [sys.executable, "-c", SCRIPT]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**kept, **variables}
    )
    faults, page = map(float, run.stdout.split())
    return faults * page


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's malloc")
def test_steps_take_no_new_memory() -> None:
    # less than one temporary of one stack
    assert _new_memory() < 2**24


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's malloc")
def test_settings_of_the_user_are_left_alone() -> None:
    # everything is given back at once, as it is asked for
    assert _new_memory(MALLOC_TRIM_THRESHOLD_="0", MALLOC_MMAP_THRESHOLD_="65536") > 2**24
