"""The entries of `optimizer.state`: views of each unit's rows, under its first parameter."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from structprecond.core.bucket import Bucket
from structprecond.core.memory import keep_freed_memory
from structprecond.core.units import Unit
from structprecond.errors import StructPrecondError


class Entry(dict[str, Tensor]):
    """The state of one unit by name, as views of the stacks.

    Assigning to a name writes the values into the stack, from any dtype and device. Names cannot be
    added or removed. Copies and pickles are plain dicts of copied tensors.
    """

    def __init__(self, label: str, views: Mapping[str, Tensor]) -> None:
        super().__init__(views)
        self.label = label

    def __setitem__(self, name: str, value: Any) -> None:
        """Write values into the stack."""
        self.check({**self, name: value})
        with torch.no_grad():
            self[name].copy_(torch.as_tensor(value))

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Write several values into the stack."""
        values = dict(*args, **kwargs)
        self.check({**self, **values})
        for name, value in values.items():
            self[name] = value

    def __ior__(self, values: Any) -> Self:  # type: ignore[override,misc]
        """Write several values into the stack."""
        self.update(values)
        return self

    def setdefault(self, name: str, default: Any = None) -> Tensor:
        """Return the value of an existing name."""
        self.check({**self, name: self.get(name, default)})
        return self[name]

    def _refuse(self, *args: Any) -> Any:
        raise StructPrecondError(
            f"Names cannot be removed from the state of {self.label}. Build a new optimizer to "
            "start from a new state."
        )

    __delitem__ = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a plain dict: a view would pickle its whole stack."""
        return dict, ({name: view.clone() for name, view in self.items()},)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Tensor]:
        """Copy as a plain dict."""
        return {name: view.clone() for name, view in self.items()}

    def adopt(self, values: Mapping[str, Any]) -> None:
        """Write all values into the stack."""
        self.check(values)
        for name, value in values.items():
            self[name] = value

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise `StructPrecondError` unless names and shapes match this entry."""
        expected = {name: tuple(view.shape) for name, view in self.items()}
        given: Any = repr(values)
        if isinstance(values, Mapping):
            given = {name: _shape(value) for name, value in values.items()}
        if expected != given:
            raise StructPrecondError(
                f"The state of {self.label} has tensors of shapes {expected}, got {given}. Names "
                "and shapes cannot be changed; build a new optimizer to start from a new state."
            )


def _shape(value: Any) -> Any:
    """Return the shape of a value that fits into a real tensor, else a description."""
    try:
        tensor = torch.as_tensor(value)
    except (RuntimeError, TypeError, ValueError):
        return repr(value)
    if tensor.is_complex() or tensor.is_meta or tensor.layout != torch.strided:
        return f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
    return tuple(tensor.shape)


class Entries:
    """The entries of all units; adopts entries that the user has replaced.

    Args:
        **shared: Tensors that every entry shows: the counters of the whole optimizer.
    """

    def __init__(self, **shared: Tensor) -> None:
        self._shared = shared
        self._entries: dict[nn.Parameter, Entry] = {}

    def show(self, buckets: Sequence[Bucket], state: MutableMapping[Any, Any]) -> None:
        """Show the rows of some buckets in the optimizer's state.

        The other parameters of a unit show only the shared counters: torch expects every parameter
        to have some state.
        """
        for bucket in buckets:
            keep_freed_memory(bucket.device)
            for unit, tensors in zip(bucket.units, bucket.unit_tensors(), strict=True):
                self.show_unit(unit, state, tensors)

    def show_unit(
        self, unit: Unit, state: MutableMapping[Any, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """Show the state of one unit, of which there is none while it is frozen."""
        for p in unit.params:
            own = tensors if p is unit.params[0] else {}
            state[p] = self._entries[p] = Entry(unit.label, {**own, **self._shared})

    def follow(
        self,
        buckets: Sequence[Bucket],
        state: MutableMapping[Any, Any],
        names: Mapping[nn.Parameter, str],
    ) -> None:
        """Move the state to the parameters' device, and adopt entries that were replaced.

        Raises:
            StructPrecondError: If the parameters of a bucket are on several devices, or if names or
                shapes of an entry have changed.
        """
        self.show([bucket for bucket in buckets if bucket.follow_device(names)], state)
        self.adopt(state)

    def adopt(self, state: MutableMapping[Any, Any]) -> None:
        """Adopt entries that were replaced.

        Raises:
            StructPrecondError: If names or shapes of an entry have changed.
        """
        if list(map(id, state.values())) == list(map(id, self._entries.values())):
            return
        for p, entry in self._entries.items():
            shown = state.get(p, {})
            if shown is not entry:
                entry.adopt(shown)
                state[p] = entry

    def renew(
        self, params: Mapping[nn.Parameter, nn.Parameter], state: MutableMapping[Any, Any]
    ) -> None:
        """Move entries to other parameters, and remove those of all others.

        Args:
            params: The parameters that keep their entries, and for each the one that has it next.
            state: The optimizer's state; what is not from this library stays.
        """
        gone = self._entries.keys() - params.keys()
        for entries in (state, self._entries):
            left = {params.get(p, p): entry for p, entry in entries.items() if p not in gone}
            entries.clear()
            entries.update(left)
