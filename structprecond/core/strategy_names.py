"""Names of strategies: `"adamw"` stands for an `AdamWStrategy` with its defaults."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from structprecond.core.strategy import Strategy
from structprecond.errors import StructPrecondError


def name_of(strategy: Strategy[Any] | type[Strategy[Any]]) -> str:
    """Return the short name of a strategy's class: `adamw` for `AdamWStrategy`."""
    cls = strategy if isinstance(strategy, type) else type(strategy)
    return cls.__name__.removesuffix("Strategy").lower()


def known_strategies() -> dict[str, list[type[Strategy[Any]]]]:
    """Return all strategies that exist, of this library and of the user, by their names.

    Of a class that was defined twice, as in a notebook's cell that ran again, only the last one
    counts.

    Example:
        >>> from structprecond import SOAPStrategy
        >>> known_strategies()["soap"] == [SOAPStrategy]
        True
    """
    classes: list[type[Strategy[Any]]] = list(_subclasses(Strategy))
    latest = {(cls.__module__, cls.__qualname__): cls for cls in classes}
    named: dict[str, list[type[Strategy[Any]]]] = {}
    for cls in latest.values():
        if not inspect.isabstract(cls):
            named.setdefault(name_of(cls), []).append(cls)
    return named


def strategy_called(name: str, own: Sequence[Strategy[Any]], asked: str) -> Strategy[Any]:
    """Return the strategy that a name stands for.

    Args:
        name: The name.
        own: The strategies of the optimizer, the main one first. Their names stand for them; every
            other name stands for a new strategy with its defaults.
        asked: Who asks for which name, as the start of a message.

    Raises:
        StructPrecondError: If no strategy, or more than one, has the name, or if it has no
            defaults.
    """
    mine = [strategy for strategy in own if name_of(strategy) == name]
    if len(mine) == 1 or (mine and mine[0] is own[0]):
        return mine[0]
    known = known_strategies()
    classes = known.get(name, [])
    if mine or len(classes) > 1:
        several = ", ".join(map(repr, mine)) or " and ".join(
            f"{cls.__module__}.{cls.__qualname__}" for cls in classes
        )
        raise StructPrecondError(
            f"{asked} {name!r}, but several strategies have that name: {several}. Give the "
            "strategy itself."
        )
    if not classes:
        public = sorted(other for other in known if not other.startswith("_"))
        names = dict.fromkeys([*map(name_of, own), *public])
        raise StructPrecondError(
            f"{asked} {name!r}, expected one of {', '.join(map(repr, names))}, or a strategy."
        )
    try:
        return classes[0]()
    except TypeError as error:
        raise StructPrecondError(
            f"{asked} {name!r}, but {classes[0].__name__} cannot be made without arguments: "
            f"{error}. Give an instance."
        ) from error


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    """Yield all classes derived from a class, in the order of their definition, parents first."""
    for derived in cls.__subclasses__():
        yield derived
        yield from _subclasses(derived)
