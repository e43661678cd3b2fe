"""Prints a plan: `python -m structprecond.plan --world 64 --optimizer SOAP my_models:build`."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from structprecond.errors import StructPrecondError
from structprecond.plan.make import plan

_COMMAND = "python -m structprecond.plan"


def find(target: str) -> Callable[..., Any]:
    """Return a callable by its place, `package.module:name`.

    Raises:
        StructPrecondError: If there is none.

    Example:
        >>> find("math:floor")(2.5)
        2
    """
    module, _, name = target.partition(":")
    if not module or not name:
        raise StructPrecondError(
            f"{target!r} names no callable. Write it as package.module:name, such as "
            "my_models.language:build."
        )
    try:
        found = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise StructPrecondError(
            f"There is no module to import for {target}: {error}. Run the command in the folder "
            "of your package, or install it."
        ) from error
    except AttributeError as error:
        raise StructPrecondError(
            f"{error}, so {target} cannot be called. Name a function of that module."
        ) from error
    if not callable(found):
        raise StructPrecondError(
            f"{target} is {found!r}, expected a callable. Name the function itself."
        )
    made: Callable[..., Any] = found
    return made


def find_optimizer(name: str) -> Callable[..., Any]:
    """Return an optimizer of this library by name, or any callable by its place.

    Raises:
        StructPrecondError: If there is none.
    """
    if ":" in name:
        return find(name)
    library = import_module("structprecond")
    base = library.StructuredOptimizer
    known = {n for n in library.__all__ if _is_optimizer(getattr(library, n), base)}
    if name not in known:
        raise StructPrecondError(
            f"There is no optimizer {name!r}. Known are {', '.join(sorted(known))}; or name a "
            "function that takes the model and mesh=, as package.module:name."
        )
    made: Callable[..., Any] = getattr(library, name)
    return made


def _is_optimizer(value: object, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base) and value is not base


def setting(text: str) -> tuple[str, Any]:
    """Return the name and the value of a setting; what is no Python literal is a text.

    Raises:
        StructPrecondError: If it has no name.

    Example:
        >>> setting("lr=0.01"), setting("structures=auto")
        (('lr', 0.01), ('structures', 'auto'))
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise StructPrecondError(f"--set takes name=value, such as lr=0.01, got {text!r}.")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a plan; return 0."""
    parser = argparse.ArgumentParser(
        prog=_COMMAND,
        description="Tell what an optimizer costs on each of many ranks, without any of them.",
    )
    parser.add_argument("build", help="package.module:name of a callable that returns the model")
    parser.add_argument("--world", type=int, required=True, help="the number of ranks")
    parser.add_argument(
        "--mesh",
        default="fsdp",
        help="fsdp (default), ddp, hsdp:SHARDxREPLICATE, or dims such as replicate=4,shard=16",
    )
    parser.add_argument(
        "--optimizer",
        default="SOAP",
        help="its name, or package.module:name of a callable that takes the model and mesh= "
        "(default: SOAP)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a keyword of the optimizer, such as lr=0.01 or structures=auto; may be repeated",
    )
    parser.add_argument("--by-rank", action="store_true", help="print a line for each rank too")
    given = parser.parse_args(arguments)
    try:
        settings = dict(map(setting, given.set))
        optimizer = partial(find_optimizer(given.optimizer), **settings)
        forecast = plan(find(given.build), optimizer, world=given.world, mesh=given.mesh)
    except StructPrecondError as error:
        parser.error(str(error))
    print(forecast)
    if given.by_rank:
        print(f"\n{forecast.by_rank()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
