"""torch's precision settings apply to the whole process; this serves requests of its threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from threading import RLock, get_ident
from typing import TypeAlias

import torch

LOCK = RLock()
"""Held while settings are switched; reentrant, as signal handlers and finalizers may run a step."""

_INHERIT = "none"
# The precision of products. "none" inherits: float32, unless the parent is set to less.
_RANKS = {"bf16": 0, "medium": 0, "tf32": 1, "high": 1, _INHERIT: 2, "ieee": 3, "highest": 3}


def has_separate_settings() -> bool:
    """Return whether each backend has its own settings, as in torch 2.9 and later.

    Once these are changed, reading the older common setting is an error.
    """
    return hasattr(torch._C, "_get_fp32_precision_getter")


class Setting:
    """A setting of the process.

    After the last context, a setting that inherited its value inherits again. Changes that other
    code makes inside a context stay.

    Args:
        read: Returns the value in effect, which may be inherited.
        write: Sets the value; "none" makes it inherit, if there is a parent.
        parent: The setting to inherit from. Default: None.

    Attributes:
        wishes: The number of contexts, in all threads, that request a value.
    """

    def __init__(
        self,
        read: Callable[[], str],
        write: Callable[[str], object],
        parent: Setting | None = None,
    ) -> None:
        self.read, self.write, self._parent = read, write, parent
        self.wishes = 0
        # the value in effect outside contexts; what was written to get it, None until a context
        # writes; the value that contexts have set, None before
        self._found = _INHERIT
        self._written: str | None = None
        self._applied: str | None = None

    @classmethod
    def of_products(cls, backend: str) -> Setting:
        """Return a backend's setting for matrix products, in torch 2.9 and later."""

        def of(backend: str, operation: str, parent: Setting | None = None) -> Setting:
            read = partial(torch._C._get_fp32_precision_getter, backend, operation)
            write = partial(torch._C._set_fp32_precision_setter, backend, operation)
            return cls(read, write, parent)

        return of(backend, "matmul", of(backend, "all", of("generic", "all")))

    def settle(self, stacks: Collection[Sequence[Wishes]]) -> None:
        """Apply the most precise value that a thread needs; call it with `LOCK` held.

        Args:
            stacks: The wishes of each thread inside contexts. A thread needs its innermost wish, or
                the value from outside without one. Without any wish, that value is restored.
        """
        now = self.read()
        if not self.wishes:
            if now != self._applied:
                self.forget()
            elif self._written is not None:
                self.write(self._written)
                # remembers what was written until all threads are outside
                self._applied = self._found
            return
        if now != self._applied:
            # the first thread inside, or other code has set it
            self._found, self._written = now, None
        wanted = [_innermost(stack, self) or self._found for stack in stacks]
        value = wanted[0] if len(wanted) == 1 else max(wanted, key=_rank)
        if value != now:
            if self._written is None:
                self._written = self._own(now)
            self.write(value)
        self._applied = value

    def forget(self) -> None:
        """Forget the values: outside contexts, changes go unnoticed."""
        self._written = self._applied = None

    def _own(self, value: str) -> str:
        """Return what was written to this setting; torch tells only the `value` in effect.

        A setting inherits if it follows its parents. So these are changed for a moment, to more
        precision if possible.
        """
        parent = self._parent
        if value == _INHERIT or parent is None or parent.read() != value:
            return value
        above = []
        while parent is not None:
            above.append((parent, parent._own(parent.read())))
            parent = parent._parent
        try:
            for other, _ in above:
                other.write("ieee" if value != "ieee" else _INHERIT)
            return value if self.read() == value else _INHERIT
        finally:
            for other, own in above:
                other.write(own)


def _rank(value: str) -> int:
    return _RANKS.get(value, _RANKS[_INHERIT])


Wishes: TypeAlias = Mapping[Setting, str]
"""The values that a context requests; it leaves other settings alone."""

# the wishes of each thread inside contexts, the innermost last
_inside: dict[int, list[Wishes]] = {}
# settings with a wish
_wanted: list[Setting] = []
# settings that have had a wish since all threads were outside
_known: set[Setting] = set()


def enter(wishes: Wishes) -> int:
    """Add wishes of the calling thread until it leaves; return the thread, for `leave`."""
    with LOCK:
        thread = get_ident()  # after the lock, where torch.compile stops tracing: it would warn
        _inside.setdefault(thread, []).append(wishes)
        for setting in wishes:
            setting.wishes += 1
            if setting.wishes == 1:
                _wanted.append(setting)
                _known.add(setting)
        try:
            _settle()
        except BaseException:
            leave(thread, wishes)
            raise
    return thread


def leave(thread: int, wishes: Wishes) -> None:
    """Withdraw the wishes with which a thread entered."""
    with LOCK:
        stack = _inside[thread]
        # the last, unless generators interleave contexts
        del stack[max(i for i, own in enumerate(stack) if own is wishes)]
        if not stack:
            del _inside[thread]
        for setting in wishes:
            setting.wishes -= 1
        _settle()
        for setting in wishes:
            if not setting.wishes:
                _wanted.remove(setting)
        if not _inside:
            while _known:
                _known.pop().forget()


def _settle() -> None:
    stacks = tuple(_inside.values())
    for setting in _wanted:
        setting.settle(stacks)


def _innermost(stack: Sequence[Wishes], setting: Setting) -> str | None:
    for wishes in reversed(stack):
        if setting in wishes:
            return wishes[setting]
    return None


def _keep_own_thread() -> None:
    """Withdraw the wishes of threads that do not exist in a forked process."""
    try:
        for thread in set(_inside) - {get_ident()}:
            for wishes in list(_inside[thread]):
                leave(thread, wishes)
    finally:
        LOCK.release()


if hasattr(os, "register_at_fork"):
    # so that no other thread is in the middle of a switch
    os.register_at_fork(
        before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=_keep_own_thread
    )
