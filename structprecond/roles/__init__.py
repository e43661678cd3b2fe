"""What every parameter of a model is for: embedding, head, norm, bias, a matrix inside, ..."""

from structprecond.roles.infer import infer_roles
from structprecond.roles.result import NOT_MATRICES, ROLES, Role, RoleName, Roles

__all__ = ["NOT_MATRICES", "ROLES", "Role", "RoleName", "Roles", "infer_roles"]
