"""Adapts docstrings to what the renderer of the API pages expects."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    r"""Renders `Example:` sections as code, and `\[ \]` as formulas without blank lines around."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            text = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
            obj.docstring.value = re.sub(r"(?ms)^\\\[.*?\\\]", r"\n\g<0>\n", text)
