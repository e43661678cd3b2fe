"""Processes of their own, for tests that need one: forked from one that has imported torch."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

# importing takes seconds, and is no part of what these tests are about
METHOD = "forkserver" if sys.platform == "linux" else "spawn"
_CONTEXT: Any = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":
    # the first optimizer of a process imports torch's compiler
    _CONTEXT.set_forkserver_preload(["hypothesis", "pytest", "torch", "torch._dynamo"])


def start(function: Callable[..., None], *args: Any) -> tuple[BaseProcess, Connection]:
    """Start a process.

    Args:
        function: What runs in it. Its last argument is the end of a pipe to send objects by.
        args: Its other arguments.

    Returns:
        The process, and the end of the pipe to receive objects by.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process: BaseProcess = _CONTEXT.Process(target=function, args=(*args, sender))
    process.start()
    sender.close()
    return process, receiver


def result_of(function: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a function that runs in a process of its own, or raise its error."""
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
