"""Names of structures, and the structure of each axis."""

from __future__ import annotations

import pickle

import pytest
import torch

from structprecond import BlockDiagonalMatrix, DenseMatrix, DiagonalMatrix, StructureError
from structprecond.structures import SUPPORTED_STRUCTURES, structure_class
from structprecond.structures.spec import StructureSpec, resolve_structures


def test_sizes_come_from_the_name() -> None:
    assert structure_class("block64diagonal").block_size == 64  # type: ignore[attr-defined]
    assert structure_class("hierarchical3_7").eye(20).a.shape == (3, 3)  # type: ignore[attr-defined]
    assert issubclass(structure_class("block64diagonal"), BlockDiagonalMatrix)


def test_a_name_is_one_class_and_its_matrices_pickle() -> None:
    cls = structure_class("block5diagonal")
    assert structure_class("block5diagonal") is cls
    assert cls.name == "block5diagonal"
    assert type(pickle.loads(pickle.dumps(cls.eye(7)))) is cls


@pytest.mark.parametrize(
    "name", ["tridiagonal", "block0diagonal", "blockdiagonal", "block<k>diagonal", "Dense", ""]
)
def test_unknown_names_raise_and_list_the_known(name: str) -> None:
    with pytest.raises(StructureError, match=r"Unknown structure .*dense, diagonal, block<k>diag"):
        structure_class(name)


def test_every_supported_name_without_sizes_resolves() -> None:
    for name, cls in SUPPORTED_STRUCTURES.items():
        if "<" not in name:
            assert resolve_structures(name, 1, "w") == (cls,)


def test_one_name_is_for_all_axes_and_a_dict_is_by_order() -> None:
    spec: StructureSpec = {1: "none", 2: ("dense", "diagonal"), 3: DiagonalMatrix}
    assert resolve_structures("dense", 2, "w") == (DenseMatrix, DenseMatrix)
    assert resolve_structures(spec, 1, "w") == (None,)
    assert resolve_structures(spec, 2, "w") == (DenseMatrix, DiagonalMatrix)
    assert resolve_structures(spec, 3, "w") == (DiagonalMatrix,) * 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({1: "dense"}, "no entry for tensors with 2 axes, such as fc.weight. Add 2: ..."),
        ({2: ("dense",)}, "gives 1 values for tensors with 2 axes, such as fc.weight"),
        (3, "takes names and subclasses of StructuredMatrix, got 3"),
        (torch.Tensor, "takes names and subclasses of StructuredMatrix"),
    ],
)
def test_specifications_that_do_not_fit_raise(spec: object, message: str) -> None:
    with pytest.raises(StructureError) as error:
        resolve_structures(spec, 2, "fc.weight")  # type: ignore[arg-type]
    assert message in str(error.value)
