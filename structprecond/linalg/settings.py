"""torch's settings of precision, which are the process's, switched for the needs of its threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from threading import RLock, get_ident
from typing import TypeAlias

import torch

# Reentrant, because signal handlers and finalizers may run a step wherever Python code is.
LOCK = RLock()
"""Held while settings are switched; whoever holds it has them to itself."""

_INHERIT = "none"
# By how precise products are. What backends do by default is float32, but may be another one's.
_RANKS = {"bf16": 0, "medium": 0, "tf32": 1, "high": 1, _INHERIT: 2, "ieee": 3, "highest": 3}


def has_separate_settings() -> bool:
    """Return whether backends have settings of their own: in torch 2.9 and later.

    To read the older one after these were changed is an error there.
    """
    return hasattr(torch._C, "_get_fp32_precision_getter")


class Setting:
    """A setting of the process.

    It goes back to what it was, not only to what it said: one that inherits from another setting
    goes on inheriting. What others set while a thread is inside of a context stays.

    Args:
        read: Returns the value that counts, which may be inherited.
        write: Sets the value; "none" lets it inherit, if there is a parent.
        parent: The setting that it inherits from.

    Attributes:
        wishes: In how many contexts, of all threads, somebody wants something of it.
    """

    def __init__(
        self,
        read: Callable[[], str],
        write: Callable[[str], object],
        parent: Setting | None = None,
    ) -> None:
        self.read, self.write, self._parent = read, write, parent
        self.wishes = 0
        # what counts outside of contexts; what was written there, None until contexts write; and
        # what contexts have made of it, None before
        self._found = _INHERIT
        self._written: str | None = None
        self._applied: str | None = None

    @classmethod
    def of_products(cls, backend: str) -> Setting:
        """Return the setting of matrix products of a backend, in torch 2.9 and later."""

        def of(backend: str, operation: str, parent: Setting | None = None) -> Setting:
            read = partial(torch._C._get_fp32_precision_getter, backend, operation)
            write = partial(torch._C._set_fp32_precision_setter, backend, operation)
            return cls(read, write, parent)

        return of(backend, "matmul", of(backend, "all", of("generic", "all")))

    def settle(self, stacks: Collection[Sequence[Wishes]]) -> None:
        """Apply the most precise of what the threads want; call it with `LOCK` held.

        Args:
            stacks: The wishes of each thread that is inside of contexts. The innermost one counts,
                and the value from outside for threads without one. If there is no wish at all, that
                value comes back.
        """
        now = self.read()
        if not self.wishes:
            if now != self._applied:
                self.forget()
            elif self._written is not None:
                self.write(self._written)
                # so that what was written is known until all threads are outside
                self._applied = self._found
            return
        if now != self._applied:
            # no thread has been inside before, or somebody else has set it
            self._found, self._written = now, None
        wanted = [_innermost(stack, self) or self._found for stack in stacks]
        value = wanted[0] if len(wanted) == 1 else max(wanted, key=_rank)
        if value != now:
            if self._written is None:
                self._written = self._own(now)
            self.write(value)
        self._applied = value

    def forget(self) -> None:
        """Forget what counted, since it may be set anew without a context that sees it."""
        self._written = self._applied = None

    def _own(self, value: str) -> str:
        """Return what was written to this setting, where `value` counts: torch tells only that.

        Whether it inherits shows when all that it inherits from changes. For that moment it changes
        to more precision, unless there is no more.
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
"""What a context wants; nothing of the settings that are not in it."""

# the wishes of each thread that is inside of contexts, those of the innermost context last
_inside: dict[int, list[Wishes]] = {}
# those that somebody wants something of
_wanted: list[Setting] = []
# those that somebody has wanted something of since all threads were outside
_known: set[Setting] = set()


def enter(wishes: Wishes) -> int:
    """Let the calling thread have its wishes until it leaves; return what `leave` has to know."""
    with LOCK:
        thread = get_ident()  # in here, where torch.compile has given up: it would warn of that
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
    """Give up what a thread wished when it entered."""
    with LOCK:
        stack = _inside[thread]
        # the last ones, unless generators are interleaved
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
    """Give up what threads wish that a forked process does not have."""
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
