"""Batched linear algebra on plain tensors, in full float32 precision or wider by default."""

from structprecond.linalg.eigen import (
    eigh,
    get_eigenbasis_eigh,
    get_eigenbasis_qr,
    off_diagonal_ratio,
    orthogonal_iteration,
    rayleigh_quotients,
    sort_eigenbasis_by_approx_eigvals,
)
from structprecond.linalg.null_space import (
    improve_eigenbasis,
    left_eigenbasis,
    refresh_eigenbasis,
)
from structprecond.linalg.polar import (
    COEFFICIENTS,
    newton_schulz,
    polar_factor,
)
from structprecond.linalg.precision import fast_float32, full_precision
from structprecond.linalg.roots import RootMethod, has_inverse_root, matrix_inverse_root
from structprecond.linalg.spectral import spectral_norm_bound

__all__ = [
    "COEFFICIENTS",
    "RootMethod",
    "eigh",
    "fast_float32",
    "full_precision",
    "get_eigenbasis_eigh",
    "get_eigenbasis_qr",
    "has_inverse_root",
    "improve_eigenbasis",
    "left_eigenbasis",
    "matrix_inverse_root",
    "newton_schulz",
    "off_diagonal_ratio",
    "orthogonal_iteration",
    "polar_factor",
    "rayleigh_quotients",
    "refresh_eigenbasis",
    "sort_eigenbasis_by_approx_eigvals",
    "spectral_norm_bound",
]
