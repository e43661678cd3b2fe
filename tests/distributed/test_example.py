"""The example of distributed training runs, and resumes on another number of ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed" / "train.py"
SMALL = "--layers 1 --width 32 --heads 2 --context 32 --batch 8 --every 1".split()


def losses_of(ranks: int, *arguments: str) -> dict[int, float]:
    """Run the example; return the loss of each step."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*launcher, "--standalone", str(EXAMPLE), *SMALL, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"step +(\d+) +loss ([\d.]+)", done.stdout)
    return {int(step): float(loss) for step, loss in found}


def test_a_run_resumes_in_another_layout(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    whole = losses_of(2, "--layout", "fsdp2", "--steps", "8")
    first = losses_of(2, "--layout", "fsdp2", "--steps", "4", "--save", folder)
    rest = losses_of(2, "--layout", "ddp", "--steps", "4", "--resume", folder)
    assert whole.keys() == {*range(8)}
    assert {**first, **rest} == pytest.approx(whole, abs=2e-3)
    assert whole[7] < whole[0]


def test_a_batch_that_the_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"--batch 7 is not divisible by 2 ranks"):
        losses_of(2, "--batch", "7")
