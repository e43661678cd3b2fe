"""A job that loses a rank while it saves goes on from the last complete checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import processes
from tests.distributed import kill_me, resuming

STEPS, DIES_AT = resuming.STEPS, 6


def _run(folder: Path, dying: int | None, moment: str = "") -> list[Any]:
    """Run a job of two ranks; return what each of them sent, None for one that was killed."""
    jobs = [
        processes.start(
            kill_me.main, rank, folder, STEPS, DIES_AT if rank == dying else None, moment
        )
        for rank in range(2)
    ]
    results: list[Any] = []
    for process, receiver in jobs:
        try:
            assert receiver.poll(60)
            results.append(receiver.recv())
        except EOFError:
            results.append(None)
        process.kill()
        process.join()
        receiver.close()
    return results


@pytest.mark.parametrize("moment", ["gather", "write"])
@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_that_is_killed_while_it_saves_leaves_the_last_complete_checkpoint(
    dying: int, moment: str, tmp_path: Path
) -> None:
    results = _run(tmp_path, dying, moment)
    assert results[dying] is None
    if moment == "gather":
        assert results[1 - dying] == "LostRankError"
        assert not (tmp_path / str(DIES_AT)).exists()
    else:
        assert isinstance(results[1 - dying], str)
        assert (tmp_path / str(DIES_AT)).exists()
    assert kill_me.last_complete(tmp_path) == DIES_AT - kill_me.EVERY
    expected = resuming.uninterrupted("alone", resuming.OPTIMIZERS["SOAP staggered"])
    assert _run(tmp_path, None) == [[p.tolist() for p in expected]] * 2
