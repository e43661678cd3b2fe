"""Adapts what is read from the source to what the renderer of the API pages expects."""

import importlib
import inspect
import re
from typing import Any

import griffe

from structprecond import StructuredOptimizer


class Docstrings(griffe.Extension):
    r"""Renders `Example:` sections as code, and `\[ \]` as formulas without blank lines around.

    Optimizers get the keywords that they pass on, and their documentation, which the source has
    once.
    """

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Show the shared keywords of an optimizer in its signature and its docstring."""
        live = getattr(importlib.import_module(cls.module.path), cls.name, None)
        if not isinstance(live, type) or not issubclass(live, StructuredOptimizer):
            return
        if cls.docstring is not None:
            cls.docstring.value = inspect.getdoc(live) or ""
        init = cls.members.get("__init__")
        if not isinstance(init, griffe.Function) or "options" not in init.parameters:
            return
        known = {parameter.name: parameter for parameter in init.parameters}
        init.parameters = griffe.Parameters(
            known["self"],
            *(
                known.get(p.name) or _parameter(p)
                for p in inspect.signature(live).parameters.values()
            ),
        )

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            text = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
            obj.docstring.value = re.sub(r"(?ms)^\\\[.*?\\\]", r"\n\g<0>\n", text)


def _parameter(parameter: inspect.Parameter) -> griffe.Parameter:
    return griffe.Parameter(
        parameter.name,
        annotation=str(parameter.annotation),
        kind=griffe.ParameterKind.keyword_only,
        default=repr(parameter.default),
    )
