"""A job that is killed at any time and restarted ends up with the same bits."""

from __future__ import annotations

import random
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import processes
from tests.core import kill_me
from tests.helpers import same_bits

STEPS = 50

Job = tuple[BaseProcess, Connection]


def _job(path: Path) -> Job:
    return processes.start(kill_me.main, path, STEPS)


def _finish(job: Job, path: Path) -> dict[str, Any]:
    """Let a job finish, and return its result."""
    process, _ = job
    process.join()
    assert process.exitcode == 0
    checkpoint: dict[str, Any] = torch.load(path)
    assert checkpoint["step"] == STEPS
    return checkpoint


def _killed(job: Job, rng: random.Random) -> bool:
    """Kill a job in or after one of its steps, unless it has ended before."""
    process, progress = job
    # counted in steps, since a busy machine could kill all jobs before their first step
    for _ in range(rng.randint(1, 25)):
        try:
            progress.recv()
        except EOFError:
            return False
    time.sleep(rng.uniform(0, 0.02))  # two steps, and a checkpoint in most cases
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode < 0


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_job_comes_to_the_same_bits(kills: int, tmp_path: Path) -> None:
    expected = _finish(_job(tmp_path / "uninterrupted.pt"), tmp_path / "uninterrupted.pt")
    rng, path = random.Random(kills), tmp_path / "checkpoint.pt"
    starts: list[int] = []
    while len(starts) < kills:
        job = _job(path)
        if _killed(job, rng):
            starts.append(torch.load(path)["step"] if path.exists() else 0)
        else:  # from the start
            assert same_bits(_finish(job, path), expected)
            path.unlink()
    assert any(0 < start < STEPS for start in starts)
    assert same_bits(_finish(_job(path), path), expected)
