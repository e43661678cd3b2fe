"""What `optimizer.state[p]` shows: views of one unit's rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from structprecond.errors import StructPrecondError


class Entry(dict[str, Tensor]):
    """The state of one unit by name, as views of the stacks that hold it.

    Assigning to a name writes the values into the stack, whatever their dtype and device.
    """

    def __init__(self, label: str, views: Mapping[str, Tensor]) -> None:
        super().__init__(views)
        self.label = label

    def __setitem__(self, name: str, value: Any) -> None:
        """Write values into the stack."""
        self.check({**self, name: value})
        with torch.no_grad():
            self[name].copy_(torch.as_tensor(value))

    def adopt(self, values: Mapping[str, Any]) -> None:
        """Write all values into the stack."""
        self.check(values)
        for name, value in values.items():
            self[name] = value

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise `StructPrecondError` unless names and shapes are those of this entry."""
        expected = {name: tuple(view.shape) for name, view in self.items()}
        given = {name: tuple(torch.as_tensor(value).shape) for name, value in values.items()}
        if expected != given:
            raise StructPrecondError(
                f"The state of {self.label} has tensors of shapes {expected}, got {given}. Names "
                "and shapes cannot be changed; build a new optimizer to start from a new state."
            )
