"""A pool of processes that run functions of tests as the ranks of a process group."""

from __future__ import annotations

import atexit
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import processes

LIMIT_S = 60.0
"""How long a function may take, in seconds."""
AFTER_A_FAILURE_S = 10.0
"""How long the other ranks may take once one has failed, in seconds."""


class RankFailedError(AssertionError):
    """A rank failed; the message has its traceback."""


class Pool:
    """Processes that stay for the whole test session; a new process group for every call.

    Args:
        world: The number of ranks.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        limit_s: float = LIMIT_S,
        group_s: float = 30,
    ) -> list[Any]:
        """Call `function(rank, *args)` in every process; return the results.

        Args:
            function: A function of a module.
            args: Its other arguments.
            limit_s: How long it may take; then all processes are killed, and the test fails.
            group_s: The time limit of the process group.

        Raises:
            RankFailedError: If a rank raised, died or took too long.
        """
        if not self._workers:
            self._workers = [processes.start_both_ways(_serve) for _ in range(self.world)]
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            for rank, (_, pipe) in enumerate(self._workers):
                pipe.send((function, args, rank, self.world, store, group_s))
            answers = self._answers(limit_s)
        failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(answers) if text]
        if failures:
            self.stop()  # whatever it left behind goes too
            raise RankFailedError("\n".join(failures))
        return [result for result, _ in answers]

    def _answers(self, limit_s: float) -> list[tuple[Any, str | None]]:
        """Return the result of each rank, or how it failed."""
        answers: list[tuple[Any, str | None]] = [(None, "no answer in time")] * self.world
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers)}
        until = time.monotonic() + limit_s
        while waiting and (ready := wait(list(waiting), max(0, until - time.monotonic()))):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    answer = pipe.recv()
                except (EOFError, OSError):
                    answer = None, "the process died"
                answers[waiting.pop(pipe)] = answer
                if answer[1] is not None:
                    # the others may wait for it
                    until = min(until, time.monotonic() + AFTER_A_FAILURE_S)
        return answers

    def stop(self) -> None:
        """Kill all processes."""
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers = []


@cache
def pool(world: int) -> Pool:
    """Return the pool of some number of ranks."""
    made = Pool(world)
    atexit.register(made.stop)
    return made


def run(world: int, function: Callable[..., Any], *args: Any, **limits: float) -> list[Any]:
    """Call `function(rank, *args)` on some ranks; see `Pool.run`."""
    return pool(world).run(function, *args, **limits)


def _serve(pipe: Connection) -> None:
    """Run what the test session sends, until it ends."""
    torch.set_num_threads(1)
    with suppress(EOFError):
        while True:
            function, args, rank, world, store, group_s = pipe.recv()
            answer: tuple[Any, str | None]
            try:
                with warnings.catch_warnings():
                    answer = _call(function, args, rank, world, store, group_s), None
            except BaseException:
                answer = None, traceback.format_exc()
            pipe.send(answer)


def _call(
    function: Callable[..., Any], args: Any, rank: int, world: int, store: str, group_s: float
) -> Any:
    warnings.simplefilter("error")
    # of torch, about itself
    warnings.filterwarnings("ignore", module="torch")
    torch.manual_seed(rank)
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=world,
        store=dist.FileStore(store, world),  # type: ignore[attr-defined]
        timeout=timedelta(seconds=group_s),
    )
    try:
        dist.barrier()  # a rank that is done at once would leave while others still connect
        return function(rank, *args)
    finally:
        dist.destroy_process_group()
        _forget_meshes()


def _forget_meshes() -> None:
    """Clear what torch has cached for meshes, whose groups exist no more."""
    redistribute = sys.modules.get("torch.distributed.tensor._redistribute")
    if redistribute is not None:
        from torch.distributed.tensor import debug

        redistribute._gen_transform_infos.cache_clear()
        debug._clear_sharding_prop_cache()
