"""One decision per step: what one rank cannot do, no rank does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from structprecond.core.naming import enumerate_names
from structprecond.core.param_groups import CONFIGURATION
from structprecond.core.plain import plain_number
from structprecond.core.ranks import Ranks, device_for
from structprecond.errors import DistributedError, LostRankError

_T = TypeVar("_T")
# torch 2.13 has renamed it
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
Facts = Mapping[str, Any]
"""What has to be the same on all ranks, by name."""
NOTHING = 0, 0
"""Numbers that add nothing to a sum over ranks."""


class Agreement:
    """Lets all ranks raise if one of them fails, or if they differ in what must be the same.

    Args:
        ranks: The ranks.
        device: The device of the parameters, used if the group cannot send from the CPU.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks = ranks
        self._device = device_for(ranks.group, device)

    def reach(
        self,
        make: Callable[[], tuple[_T, Facts, tuple[int, int]]],
        what: str = "step",
        verb: str = "make",
    ) -> tuple[_T, tuple[int, int]]:
        """Call a function on every rank; return its result if all succeed, and sums over ranks.

        Args:
            make: Returns the result, the facts, and two numbers to sum.
            what: What it is about, for messages.
            verb: What is about to happen to that.

        Raises:
            DistributedError: If it raised on another rank, or if facts differ.
        """
        error: Exception | None = None
        try:
            result, facts, numbers = make()
        except Exception as raised:
            error, facts, numbers = raised, {}, NOTHING
        rows = self._gather(
            [0 if error is None else 1, digest_of(sorted(facts.items())), *numbers], what
        )
        if any(row[0] for row in rows):
            text = None if error is None else _describe(error)
            texts = self.share(text, f"what went wrong in the {what}")
            if error is not None:
                raise error
            failed = [(i, text) for i, text in enumerate(texts) if text is not None]
            raise DistributedError(
                f"Rank {self.ranks.numbers[failed[0][0]]} cannot {verb} the {what}, so no rank "
                f"does: {failed[0][1]}"
            )
        if len({row[1] for row in rows}) > 1:
            raise DistributedError(self._difference(facts, what, verb))
        return result, (sum(row[2] for row in rows), sum(row[3] for row in rows))

    def _difference(self, facts: Facts, what: str, verb: str) -> str:
        """Return a message about facts that differ."""
        everywhere: list[Facts] = self.share(dict(facts), f"what differs in the {what}")
        for name in dict.fromkeys(name for known in everywhere for name in known):
            values = [repr(known.get(name)) for known in everywhere]
            if len(set(values)) > 1:
                other = next(i for i, value in enumerate(values) if value != values[0])
                numbers = self.ranks.numbers
                one, two = _first_difference(everywhere[0].get(name), everywhere[other].get(name))
                return (
                    f"The ranks differ in {name}, so no rank {verb}s the {what}: rank {numbers[0]} "
                    f"has {one}, rank {numbers[other]} has {two}."
                )
        return f"The ranks differ, so no rank {verb}s the {what}."

    def _gather(self, numbers: Sequence[int], what: str) -> list[list[int]]:
        own = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        all_ = own.new_empty(self.ranks.size * len(own))
        with naming_ranks(f"the decision about the {what}", self.ranks):
            _all_gather(all_, own, group=self.ranks.group)
            # read here: accelerators report errors of a collective only then
            rows: list[list[int]] = all_.view(self.ranks.size, -1).tolist()
        return rows

    def share(self, own: Any, what: str) -> list[Any]:
        """Return the values of all ranks.

        Args:
            own: The value of this rank.
            what: What it is, for messages.
        """
        everywhere: list[Any] = [None] * self.ranks.size
        with naming_ranks(what, self.ranks):
            dist.all_gather_object(everywhere, own, group=self.ranks.group)
        return everywhere


@contextmanager
def naming_ranks(what: str, ranks: Ranks) -> Iterator[None]:
    """Let errors of collectives name this rank, what it waited for, and whom.

    Raises:
        LostRankError: If a collective fails or takes longer than the time limit of its group.
    """
    try:
        yield
    except RuntimeError as error:
        me = ranks.numbers[ranks.me]
        others = [str(number) for number in ranks.numbers if number != me]
        raise LostRankError(
            f"Rank {me} did not get {what} from the ranks {enumerate_names(others)}: {error}. Did "
            "one of them stop, or make other steps? The time limit is that of the process group."
        ) from error


def digest_of(value: Any) -> int:
    """Return a number that is almost surely another one for a value with another `repr`."""
    digest = blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _first_difference(one: Any, two: Any) -> tuple[str, str]:
    """Return two values, without the parts of mappings that are the same."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        for key in {**one, **two}:
            if repr(one.get(key)) != repr(two.get(key)):
                return f"{key}: {one.get(key)!r}", f"{key}: {two.get(key)!r}"
    return repr(one), repr(two)


def facts_of(param_groups: Sequence[Mapping[str, Any]], global_step: Tensor) -> Facts:
    """Return the hyperparameters of param groups as facts; tensors on accelerators are not read."""
    others = {*CONFIGURATION, "params", "param_names"}
    return {"the number of steps": int(global_step)} | {
        f"param group {number}": {
            key: _plain(value) for key, value in group.items() if key not in others
        }
        for number, group in enumerate(param_groups)
    }


def _plain(value: Any) -> Any:
    """Return a value whose `repr` is the same on all ranks if the values are."""
    if isinstance(value, Tensor):
        return value.tolist() if value.device.type == "cpu" else value.device.type
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    number = plain_number(value)
    # other objects may show an address, or the device of a rank
    return (
        number if number is None or isinstance(number, int | float | str) else type(value).__name__
    )
