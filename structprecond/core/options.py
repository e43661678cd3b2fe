"""Keywords that all optimizers share: written once, shown in every signature and docstring."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack, get_args, get_origin

import torch

from structprecond.checks import check_choice, check_flags
from structprecond.core.chosen_policies import Policies
from structprecond.core.ranks import Mesh
from structprecond.core.rounding import Rounding
from structprecond.core.routing import UserRoutes
from structprecond.core.strategy import Strategy
from structprecond.groups import PreconditionerGroup
from structprecond.structures.spec import PerAxis, StructureSpec

Nonfinite = Literal["skip", "raise", "ignore"]
Refresh = Literal["synchronous", "staggered"]
_RAISES = """Raises:
    StructPrecondError: If an argument is wrong; the subclasses say which kind."""
_T = TypeVar("_T", bound=Strategy[Any])


class CommonOptions(TypedDict, total=False):
    """The keywords of every optimizer; `StructuredOptimizer` has their defaults.

    Args:
        routes: Which parameters go to another strategy: a dict from roles (see `infer_roles`) and
            patterns of parameter names to strategies or their names, as in
            `{"embedding": "adamw", "*.lora_A.*": "adamw", "head": AdamWStrategy()}`. A single
            strategy or name, as in `routes="adamw"`, gets all parameters except hidden matrices and
            convolutions. Their weight decay is the optimizer's. Default: None, the optimizer's own
            routes.
        no_decay: Which parameters have no weight decay: roles and patterns of parameter names, as
            in `("norm", "bias", "*.scale")`. Default: (), none.
        combine_params: The groupings, most important first. Default: None, the strategy's own; for
            most, each parameter is a unit.
        policies: What changes the directions before the parameters move, in this order, as in
            `(MatchRMS(0.2), CautiousDecay())`. A sequence is for the parameters of the optimizer's
            own strategy, not for those that `routes` or roles send elsewhere; a dict has one for
            each strategy by its name, as in `{"muon": (Hyperball(),), "adamw": (CapRMS(),)}`.
            Default: None, those of the strategy; for most, none.
        nonfinite: What to do with a unit whose gradient is not finite, or so large that state or
            parameters would overflow: "skip" the unit and count it, "raise" before anything is
            changed, or "ignore", without a check. Default: "skip".
        rounding: How bfloat16 and float16 parameters are rounded after an update in float32:
            "nearest" loses updates below the last digit; "stochastic" rounds up or down at random,
            so that they count on average, and a resumed run repeats the bits; "kahan" keeps the
            rounding error in the state, in the parameter's dtype, and adds it to the next update.
            Default: "nearest".
        maximize: Whether to maximize. Default: False.
        verbose_init: Whether to print how each parameter is treated; of several ranks that train
            one model, the first one prints. Default: False.
        mesh: The ranks that own rows: a `DeviceMesh` or a `ProcessGroup`. Each row's state and
            updates are then on one rank only. Default: None; DTensors, as under `fully_shard`, are
            owned by the ranks that hold them, and other parameters have all state on every rank.
    """

    routes: UserRoutes | None
    no_decay: Sequence[str]
    combine_params: Sequence[PreconditionerGroup] | None
    policies: Policies | None
    nonfinite: Nonfinite
    rounding: Rounding
    maximize: bool
    verbose_init: bool
    mesh: Mesh | None


class FactorOptions(CommonOptions, total=False):
    """The keywords of optimizers with Kronecker factors.

    Args:
        structures: The structures of the Kronecker factors: `"auto"`, one name of
            `SUPPORTED_STRUCTURES`, or a dict from the number of axes to one name or to one name per
            axis, as in `{1: "diagonal", 2: ("auto", "block64diagonal")}`. A strategy refuses
            structures that it cannot use. `"auto"` is `"dense"`, without a factor for an axis that
            is longer than `max_precond_dim`, or longer than 1,024 and more than 8 times as long as
            all other axes together. Default: `"auto"`.
        preconditioner_dtypes: The dtypes in which Kronecker factors are stored, given like
            `structures`. Default: None, the dtype of the computation: float64 for float64
            parameters, else float32.
        refresh: When rows with the same interval are refreshed: in the same step ("synchronous", as
            published), or "staggered" over the interval, once per interval each.
            Default: "synchronous".
    """

    structures: StructureSpec
    preconditioner_dtypes: PerAxis[torch.dtype | None]
    refresh: Refresh


class SharedKeywords:
    """Base of the optimizers, which takes the shared keywords; facades pass theirs to it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Add the shared keywords to the signature and the docstring of a class."""
        super().__init_subclass__(**kwargs)
        base = cls.__mro__[1]
        if base is SharedKeywords:
            add_arguments(cls, arguments_of(FactorOptions, CommonOptions))
        else:
            show_options(cls, base)

    def __new__(cls, *args: Any, **keywords: Any) -> Self:
        """Refuse unknown keywords; copies are made without keywords."""
        check_keywords(cls, keywords)
        return super().__new__(cls)


def check_values(
    nonfinite: object, refresh: object, rounding: object, maximize: object, verbose_init: object
) -> None:
    """Raise `StructPrecondError` unless the keywords have values of their types."""
    check_choice("nonfinite", nonfinite, Nonfinite)
    check_choice("refresh", refresh, Refresh)
    check_choice("rounding", rounding, Rounding)
    check_flags(maximize=maximize, verbose_init=verbose_init)


def from_keywords(strategy: type[_T], given: Mapping[str, Any]) -> tuple[_T, dict[str, Any]]:
    """Make a strategy and its hyperparameters from the keywords of a facade.

    Args:
        strategy: The strategy's class.
        given: The keywords by name; unknown names, such as `self`, are ignored.

    Example:
        >>> strategy, hp = from_keywords(AdamWStrategy, {"lr": 0.1, "self": None})
        >>> strategy, hp
        (AdamWStrategy(), {'lr': 0.1})
    """
    static = {f.name: given[f.name] for f in fields(strategy) if f.name in given}
    return strategy(**static), {n: given[n] for n in strategy.hyperparameters if n in given}


def check_keywords(cls: type, given: Mapping[str, Any]) -> None:
    """Raise `TypeError` if a constructor does not take one of the given keywords."""
    known = inspect.signature(cls).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return
    for name in given.keys() - known.keys():
        close = get_close_matches(name, known, 1)
        hint = f"Did you mean {close[0]!r}?" if close else f"It takes {', '.join(known)}."
        raise TypeError(f"{cls.__name__} got an unexpected keyword argument {name!r}. {hint}")


def show_options(cls: type, base: type) -> None:
    """Add the keywords that a class passes to its base to the class's signature and docstring.

    The constructor of the class ends in `**options: Unpack[Keywords]`, with a `TypedDict`
    `Keywords`. Types, defaults and docs of the keywords come from the base.

    Args:
        cls: The class to complete.
        base: The class that takes the keywords.
    """
    if "__init__" not in cls.__dict__:
        add_arguments(cls, arguments_of(base))
        return
    passed: list[str] = []
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    *own, last = signature.parameters.values()
    if last.kind is inspect.Parameter.VAR_KEYWORD:
        names = vars(sys.modules[cls.__module__])
        kind = eval(last.annotation, names) if isinstance(last.annotation, str) else last.annotation
        if get_origin(kind) is Unpack:
            known = get_args(kind)[0].__annotations__
            inherited = inspect.signature(base.__init__).parameters  # type: ignore[misc]
            passed = [name for name in inherited if name in known]
            own += [inherited[name] for name in passed]
            complete = signature.replace(parameters=own)
            cls.__init__.__signature__ = complete  # type: ignore[misc]
    entries = _take_apart(base.__doc__)[1]
    shown = [name for name in ("model", "params") if name in entries]
    add_arguments(cls, {name: entries[name] for name in (*shown, *passed) if name in entries})


def add_arguments(cls: type, entries: Mapping[str, str]) -> None:
    """Add arguments to the docstring of a class: model and params first, the others last.

    Args:
        cls: The class; nothing is added unless its docstring has arguments.
        entries: The entries to add by name; existing ones stay.
    """
    head, listed, tail = _take_apart(cls.__doc__)
    if listed:
        first = {name: entries[name] for name in ("model", "params") if name in entries}
        lines = "\n".join((first | listed | {**entries, **listed}).values())
        raises = "" if "Raises:" in tail else f"{_RAISES}\n\n"
        cls.__doc__ = f"{head}\nArgs:\n{lines}\n\n{raises}{tail}".rstrip()


def arguments_of(*documented: type) -> dict[str, str]:
    """Return the entries of the "Args:" sections of some classes by name."""
    return {n: entry for cls in documented for n, entry in _take_apart(cls.__doc__)[1].items()}


def _take_apart(doc: str | None) -> tuple[str, dict[str, str], str]:
    """Split a docstring into the text before its arguments, the arguments by name, and the rest."""
    head, _, body = inspect.cleandoc(doc or "").partition("\nArgs:\n")
    end = re.search(r"^\S", body, re.MULTILINE)
    section, tail = (body[: end.start()], body[end.start() :]) if end else (body, "")
    entries = re.split(r"\n(?=    \w+:)", section.rstrip()) if section else []
    return head, {entry.split(":")[0].strip(): entry for entry in entries}, tail
