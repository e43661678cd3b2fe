"""Runs whose rows have owners resume to the bits of uninterrupted ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import pool, resuming

SOME = ("SOAP joint", "Muon")


@pytest.mark.parametrize("layout", ["replicated", "fsdp"])
def test_every_optimizer_resumes_on_two_ranks(layout: str, tmp_path: Path) -> None:
    names = tuple(resuming.OPTIMIZERS)
    results = pool.run(2, resuming.resume, layout, names, "a file per rank", str(tmp_path))
    assert results == [[]] * 2


@pytest.mark.parametrize("layout", ["hsdp", "tensor_parallel"])
def test_every_optimizer_resumes_on_four_ranks(layout: str, tmp_path: Path) -> None:
    names = tuple(resuming.OPTIMIZERS)
    assert pool.run(4, resuming.resume, layout, names, "folder", str(tmp_path)) == [[]] * 4


@pytest.mark.parametrize("way", resuming.WAYS)
def test_two_ranks_resume_in_every_way(way: str, tmp_path: Path) -> None:
    assert pool.run(2, resuming.resume, "fsdp", SOME, way, str(tmp_path)) == [[]] * 2


@pytest.mark.parametrize("way", ["full", "from rank 0"])
@pytest.mark.parametrize("layout", ["hsdp", "tensor_parallel"])
def test_four_ranks_resume_from_whole_tensors(layout: str, way: str, tmp_path: Path) -> None:
    assert pool.run(4, resuming.resume, layout, SOME, way, str(tmp_path)) == [[]] * 4
