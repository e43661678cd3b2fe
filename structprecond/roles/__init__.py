"""The role of every parameter of a model: embedding, head, norm, bias, hidden matrix, ..."""

from structprecond.roles.infer import infer_roles
from structprecond.roles.result import NOT_MATRICES, ROLES, Role, RoleName, Roles

__all__ = ["NOT_MATRICES", "ROLES", "Role", "RoleName", "Roles", "infer_roles"]
