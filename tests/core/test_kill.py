"""A job that is killed at any moment and started again ends up with the same bits."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import same_bits

SCRIPT = Path(__file__).with_name("kill_me.py")
STEPS = 50


def _job(path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(SCRIPT), str(path), str(STEPS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0)


def _finish(job: subprocess.Popen[bytes], path: Path) -> dict[str, Any]:
    """Let a job end, and return what it came to."""
    job.communicate()
    assert job.returncode == 0
    checkpoint: dict[str, Any] = torch.load(path)
    assert checkpoint["step"] == STEPS
    return checkpoint


def _killed(job: subprocess.Popen[bytes], rng: random.Random) -> bool:
    """Kill a job in or after one of its steps, unless it has ended before."""
    assert job.stdout is not None
    # counted in steps, so that a busy machine does not end all jobs before their first one
    for _ in range(rng.randint(1, 25)):
        if not job.stdout.read(1):
            return False
    time.sleep(rng.uniform(0, 0.02))  # two steps, and a checkpoint in most cases
    job.kill()
    job.communicate()
    return job.returncode < 0


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_job_comes_to_the_same_bits(kills: int, tmp_path: Path) -> None:
    expected = _finish(_job(tmp_path / "uninterrupted.pt"), tmp_path / "uninterrupted.pt")
    rng, path = random.Random(kills), tmp_path / "checkpoint.pt"
    starts: list[int] = []
    while len(starts) < kills:
        job = _job(path)
        if _killed(job, rng):
            starts.append(torch.load(path)["step"] if path.exists() else 0)
        else:  # all over again
            assert same_bits(_finish(job, path), expected)
            path.unlink()
    assert any(0 < start < STEPS for start in starts)
    assert same_bits(_finish(_job(path), path), expected)
