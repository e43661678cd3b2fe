"""The names of the roles, and the result of `infer_roles`."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

from structprecond.tables import lay_out

RoleName: TypeAlias = Literal[
    "embedding",
    "head",
    "norm",
    "bias",
    "conv",
    "depthwise",
    "fused_qkv",
    "experts",
    "stack",
    "router",
    "matrix",
    "other",
]
"""The role of a parameter."""

ROLES: tuple[RoleName, ...] = get_args(RoleName)
"""All roles."""

NOT_MATRICES: tuple[RoleName, ...] = (
    "embedding",
    "head",
    "norm",
    "bias",
    "depthwise",
    "router",
    "other",
)
"""The roles of the parameters that are no linear maps between hidden features."""


class Role(NamedTuple):
    """The role of a parameter.

    Attributes:
        role: One of `ROLES`.
        reason: Why it is this role.
        shape: The shape of the parameter.
    """

    role: RoleName
    reason: str
    shape: tuple[int, ...] = ()


class Roles(dict[str, Role]):
    """The role of every parameter by its name, in the order of the model; print it for a table."""

    def __str__(self) -> str:
        """Return a table with one line per parameter."""
        table = [("parameter", "shape", "role", "reason")]
        for name, (role, reason, shape) in self.items():
            table.append((name, "x".join(map(str, shape)) or "scalar", role, reason))
        return "\n".join(lay_out(table))
