"""The contract of strategies."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from structprecond.core.chosen_policies import decay_is_decoupled
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.routing import as_routing
from structprecond.errors import StructureError
from structprecond.testing.cells import (
    FACTORS,
    NO_POLICY,
    NO_STRUCTURE,
    POLICIES,
    STRUCTURES,
    Cell,
    run_cell,
)
from structprecond.testing.comparing import first_difference
from structprecond.testing.covering import all_cases, covering_array
from structprecond.testing.models import TinyModel, loss_of, set_grads
from structprecond.testing.runs import PRECISIONS, Run
from structprecond.testing.situations import SAVED_AT, SITUATIONS


class StrategyContract:
    """Tests of a strategy, independent of its update rule.

    A small model trains in every situation (a layer gets gradients late, misses some, or is frozen
    and thawed; gradients are accumulated; a param group is added; parameters are empty, scalar or
    tied), in float64, float32, bfloat16, float16 and mixed precision with a `GradScaler`, with
    every structure. Saving and resuming, deep-copying or pickling the run must not change its later
    bits. No step may change gradients or units without a gradient, and all values must stay finite.

    `test_pair` covers every pair of these settings and of some policies. `test_all` runs the full
    product and is marked `slow`: declare this marker in pytest's settings, and deselect it with
    `-m "not slow"`.

    Attributes:
        structures: The names of the structures that the strategy can use, one of each kind. It must
            refuse the others. Default: no Kronecker factors.
        refusal: Why it refuses the others, for the table of results.

    Example:
        >>> class TestSOAP(StrategyContract):
        ...     structures = ("dense", "diagonal", "block2diagonal", "none")
        ...
        ...     def make(self, model, **overrides):
        ...         return SOAP(model, lr=0.01, precondition_frequency=3, **overrides)
    """

    structures: ClassVar[tuple[str, ...]] = (NO_STRUCTURE,)
    refusal: ClassVar[str] = "no factors"

    @abstractmethod
    def make(self, model: nn.Module, **overrides: Any) -> StructuredOptimizer:
        """Return an optimizer with the strategy for a model.

        Choose hyperparameters so that refreshes and the like happen within 7 steps and again within
        22.

        Args:
            model: The model.
            overrides: Arguments to pass on: `params`, `policies`, and `structures` if the strategy
                has factors.
        """
        raise NotImplementedError

    # --- the cells -------------------------------------------------------------------------------

    @classmethod
    def cells(cls) -> list[Cell]:
        """Return the full product without policies, and all policies in all situations."""
        full = {"structure": cls.structures, **FACTORS}
        policed = {**full, "structure": cls.structures[:1], "check": ("resume",)}
        cases = [*all_cases(full), *all_cases({**policed, "policies": cls().policies()})]
        return [Cell(**case) for case in cases]

    @classmethod
    def covering_cells(cls) -> list[Cell]:
        """Return cells that cover every pair of settings."""
        return list(_covering_cells(cls.structures, (NO_POLICY, *cls().policies())))

    def policies(self) -> tuple[str, ...]:
        """Return the names of the `POLICIES` that the strategy can use."""
        main = as_routing(self.make(TinyModel()).param_groups[0]["strategy"]).main
        return tuple(
            name
            for name, own in POLICIES.items()
            if decay_is_decoupled(main) or not any(one.needs_decoupled_decay for one in own)
        )

    @classmethod
    def refused(cls) -> list[str]:
        """Return the structures that the strategy must refuse."""
        # "auto" and "dense" are defaults, so a strategy cannot tell that it was requested
        kept = ("dense",) if cls.structures == (NO_STRUCTURE,) else cls.structures
        return [name for name in STRUCTURES if name not in kept]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make a test per cell of the covering array, and one slow test per structure."""
        if "cell" in metafunc.fixturenames:
            metafunc.parametrize("cell", self.covering_cells(), ids=str)
        if "structure" in metafunc.fixturenames:
            metafunc.parametrize("structure", self.structures)

    def failures(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Exception]]:
        """Run cells, and yield the failed ones with their errors."""
        together: dict[Cell, list[Cell]] = {}
        for cell in cells:
            together.setdefault(replace(cell, check=""), []).append(cell)
        for group in together.values():
            try:
                run_cell(self.make, *group)
            except Exception:
                for cell in group:
                    try:
                        run_cell(self.make, cell)
                    except Exception as error:
                        yield cell, error

    def accepted(self) -> list[str]:
        """Return the structures that the strategy wrongly accepts."""
        strategy = self.make(TinyModel()).param_groups[0]["strategy"]
        return [name for name in self.refused() if not _is_refused(strategy, name)]

    # --- tests -----------------------------------------------------------------------------------

    def test_pair(self, cell: Cell) -> None:
        """An interrupted run ends in the same bits, for every pair of settings."""
        run_cell(self.make, cell)

    @pytest.mark.slow
    def test_all(self, structure: str) -> None:
        """An interrupted run ends in the same bits, for all settings."""
        cells = [cell for cell in self.cells() if cell.structure == structure]
        found = [f"{cell}: {error}" for cell, error in self.failures(cells)]
        assert not found, "\n".join(found)

    def test_structures_that_it_cannot_use_are_refused(self) -> None:
        """Structures that are not in `structures` raise at construction."""
        assert not self.accepted()

    def test_same_seed_same_bits(self, structure: str) -> None:
        """Two runs from the same start end in the same bits."""
        cell = Cell(structure, PRECISIONS[1], SITUATIONS[0], "resume")
        first, second = (
            Run(self.make, cell.situation, cell.precision, cell.overrides).train_until(2 * SAVED_AT)
            for _ in range(2)
        )
        difference = first_difference(first.values(), second.values())
        assert difference is None, difference

    def test_order_of_registration_does_not_matter(self, structure: str) -> None:
        """The order of registration changes results only by rounding."""
        overrides = Cell(structure, PRECISIONS[0], SITUATIONS[0], "resume").overrides
        models = []
        for turned in (False, True):
            torch.manual_seed(0)
            model = TinyModel().double()
            if turned:
                model._modules = dict(reversed(model._modules.items()))
                for layer in model.children():
                    layer._parameters = dict(reversed(layer._parameters.items()))
            optimizer = self.make(model, **overrides)
            for step in range(2 * SAVED_AT):
                loss_of(model, step, 0, torch.float64).backward()
                _randomize_gradients(model, step)
                optimizer.step()
            models.append(dict(model.named_parameters()))
        assert list(models[0]) != list(models[1])
        for name, p in models[0].items():
            assert (p - models[1][name]).norm() <= 1e-10 * p.norm(), name

    def test_a_layer_does_not_notice_the_others(self, structure: str) -> None:
        """A layer trains the same way whether the other layers train or pause."""
        overrides = Cell(structure, PRECISIONS[0], SITUATIONS[0], "resume").overrides
        layers = []
        for alone in (False, True):
            torch.manual_seed(0)
            model = TinyModel().double()
            optimizer = self.make(model, **overrides)
            for step in range(2 * SAVED_AT):
                loss_of(model, step, 0, torch.float64).backward()
                _randomize_gradients(model, step)
                for name, p in model.named_parameters():
                    own = name.startswith("second.")
                    # the layer's own pause misses refreshes
                    if (own and step in (0, 4, 5, 6)) or (alone and not own):
                        p.grad = None
                optimizer.step()
            layers.append(model.second)
        for p, q in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
            assert (p - q).norm() <= 1e-10 * q.norm()


def _randomize_gradients(model: nn.Module, step: int) -> None:
    """Replace gradients by noise, so that rounding does not decide undetermined directions."""
    set_grads([p for _, p in sorted(model.named_parameters())], step)


@cache
def _covering_cells(structures: tuple[str, ...], policies: tuple[str, ...]) -> tuple[Cell, ...]:
    factors = {"structure": structures, **FACTORS, "policies": policies}
    return tuple(Cell(**case) for case in covering_array(factors))


def _is_refused(strategy: Any, structure: str) -> bool:
    try:
        hyperparameters = {"lr": 0.1}  # some have no default
        StructuredOptimizer(
            TinyModel(),
            strategy=strategy,
            hyperparameters=hyperparameters,
            structures=structure,
        )
    except StructureError:
        return True
    return False
