"""Separate processes for tests, forked from one that has imported torch."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

# importing takes seconds, and these tests do not measure it
METHOD = "forkserver" if sys.platform == "linux" else "spawn"
_CONTEXT: Any = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":
    # the first optimizer of a process imports torch's compiler
    _CONTEXT.set_forkserver_preload(["hypothesis", "pytest", "torch", "torch._dynamo"])


def start(function: Callable[..., None], *args: Any) -> tuple[BaseProcess, Connection]:
    """Start a process.

    Args:
        function: The function to run. Its last argument is the pipe end to send objects through.
        args: Its other arguments.

    Returns:
        The process, and the pipe end to receive objects from.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process: BaseProcess = _CONTEXT.Process(target=function, args=(*args, sender))
    process.start()
    sender.close()
    return process, receiver


def start_both_ways(function: Callable[..., None]) -> tuple[BaseProcess, Connection]:
    """Start a daemon process; return it, and the pipe end to talk to it.

    Args:
        function: The function to run. Its argument is the other pipe end.
    """
    mine, theirs = _CONTEXT.Pipe()
    process: BaseProcess = _CONTEXT.Process(target=function, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, mine


def result_of(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function in a separate process; return its result or raise its error."""
    process, receiver = start(_send_result, function, args)
    try:
        result, error = receiver.recv()
    finally:
        process.join()
    if error is not None:
        raise error
    return result


def _send_result(function: Callable[..., Any], args: Any, sender: Connection) -> None:
    try:
        sender.send((function(*args), None))
    except BaseException as error:
        sender.send((None, error))
