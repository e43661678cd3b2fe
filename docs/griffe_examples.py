"""Renders an `Example:` section as code, as is done for `Examples:`."""

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Gives the sections the title that the docstring parser knows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename the section in the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
