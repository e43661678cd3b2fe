"""Steps reuse the memory that earlier steps have freed."""

from __future__ import annotations

import copy
import ctypes
import os
import pickle
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from structprecond import SOAP, AdamW, StructPrecondError
from structprecond.core import memory
from tests.helpers import set_grads

# several temporaries of 16 and 40 MB at once: more than glibc keeps by default
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
    """Return the newly allocated bytes of a step, in a process with environment variables."""
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
    # everything is returned at once, as requested
    assert _new_memory(MALLOC_TRIM_THRESHOLD_="0", MALLOC_MMAP_THRESHOLD_="65536") > 2**24


# --- when it is set ------------------------------------------------------------------------------

Calls = list[tuple[int, int]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Return the calls of mallopt so far, in a simulated new process with glibc."""
    made: Calls = []

    def mallopt(parameter: int, value: int) -> int:
        made.append((parameter, value))
        return 1

    library = SimpleNamespace(mallopt=mallopt)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in (*memory._VARIABLES, memory._SWITCH):
        monkeypatch.delenv(name, raising=False)
    memory._set_thresholds.cache_clear()
    yield made
    memory._set_thresholds.cache_clear()


def _forget(calls: Calls) -> None:
    calls.clear()
    memory._set_thresholds.cache_clear()


def test_it_is_set_once_when_an_optimizer_is_made(calls: Calls) -> None:
    AdamW([nn.Parameter(torch.zeros(2))])
    AdamW([nn.Parameter(torch.zeros(3))])
    assert len(calls) == 2
    assert dict(calls) == {-3: 2**28, -1: 2**29}


def test_steps_set_nothing(calls: Calls) -> None:
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = SOAP([p])
    _forget(calls)
    for step in range(3):
        set_grads([p], step)
        optimizer.step()
    assert not calls


def test_parameters_elsewhere_are_no_reason(calls: Calls) -> None:
    optimizer = AdamW([nn.Parameter(torch.zeros(2, device="meta"))])
    assert not calls
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert calls


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_it_is_set_where_a_copy_arrives(copied: Callable[[Any], Any], calls: Calls) -> None:
    optimizer = AdamW([nn.Parameter(torch.zeros(2))])
    _forget(calls)
    copied(optimizer)
    assert calls


def test_it_is_set_when_a_model_moves_to_the_cpu(calls: Calls) -> None:
    p = nn.Parameter(torch.zeros(2))
    optimizer = AdamW([p])
    _forget(calls)
    optimizer.buckets[0].device = torch.device("meta")  # as if it came from another device
    set_grads([p], 0)
    optimizer.step()
    assert calls


def test_the_user_can_switch_it_off(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRUCTPRECOND_KEEP_FREED_MEMORY", "0")
    AdamW([nn.Parameter(torch.zeros(2))])
    assert not calls
    _forget(calls)
    monkeypatch.setenv("STRUCTPRECOND_KEEP_FREED_MEMORY", "1")
    AdamW([nn.Parameter(torch.zeros(2))])
    assert calls
    _forget(calls)
    monkeypatch.setenv("STRUCTPRECOND_KEEP_FREED_MEMORY", "off")
    with pytest.raises(StructPrecondError, match=r"KEEP_FREED_MEMORY is 'off'. Set it to 0"):
        AdamW([nn.Parameter(torch.zeros(2))])
    assert not calls
