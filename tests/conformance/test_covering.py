"""The choice of cells is small, deterministic and complete."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from structprecond.structures import SUPPORTED_STRUCTURES
from structprecond.structures.spec import structure_class
from structprecond.testing import covering_array
from structprecond.testing.cells import FACTORS, NO_STRUCTURE, STRUCTURES
from structprecond.testing.table import CONTRACTS


def _pairs(cases: list[dict[str, Any]]) -> set[Any]:
    return {pair for case in cases for pair in combinations(case.items(), 2)}


@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    impossible=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3))),
)
def test_all_possible_pairs_are_covered_and_no_impossible_case_is_chosen(
    sizes: list[int], impossible: set[tuple[int, int]]
) -> None:
    factors = {f"f{i}": list(range(size)) for i, size in enumerate(sizes)}

    def excluded(case: dict[str, Any]) -> bool:
        return (case["f0"], case["f1"]) in impossible

    product_of_all = [dict(zip(factors, v, strict=True)) for v in product(*factors.values())]
    possible = [case for case in product_of_all if not excluded(case)]
    chosen = covering_array(factors, excluded)
    assert all(case in possible for case in chosen)
    assert _pairs(chosen) == _pairs(possible)
    assert covering_array(factors, excluded) == chosen


def test_the_choice_is_about_as_small_as_can_be() -> None:
    factors = {name: list(range(5)) for name in "abcd"}
    # an orthogonal array would have 25 cases
    assert 25 <= len(covering_array(factors)) <= 40


def test_every_pair_of_the_table_is_covered_or_excluded_with_a_reason() -> None:
    settings: dict[str, Any] = {"structure": (*STRUCTURES, NO_STRUCTURE), **FACTORS}
    wanted = {
        (name, pair)
        for name in CONTRACTS
        for (a, values), (b, others) in combinations(settings.items(), 2)
        for pair in product(product([a], values), product([b], others))
    }
    for name, contract in CONTRACTS.items():
        for cell in contract.covering_cells():
            wanted -= {(name, pair) for pair in combinations(vars(cell).items(), 2)}
    for name, pair in wanted:
        contract, structure = CONTRACTS[name], dict(pair)["structure"]
        assert structure not in contract.structures
        is_default = structure == "dense" and contract.structures == (NO_STRUCTURE,)
        means_none = structure == NO_STRUCTURE
        assert is_default or means_none or (structure in contract.refused() and contract.refusal)


def test_every_structure_of_the_library_is_tried() -> None:
    tried = {None if name == "none" else structure_class(name) for name in STRUCTURES}
    for known in SUPPORTED_STRUCTURES.values():
        assert any(
            t is known or (t is not None and known is not None and issubclass(t, known))
            for t in tried
        )
