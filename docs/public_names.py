"""Refuses to build the site if a public name is on no page of the API."""

from __future__ import annotations

import importlib
import pkgutil
import zlib
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

import structprecond


def public_names() -> set[str]:
    """Return the names in `__all__` of the package and of its public parts."""
    parts = (part.name for part in pkgutil.iter_modules(structprecond.__path__))
    modules = [structprecond] + [
        importlib.import_module(f"structprecond.{part}") for part in parts if part[0] != "_"
    ]
    return {f"{m.__name__}.{name}" for m in modules for name in getattr(m, "__all__", ())}


def documented_names(site: Path) -> set[str]:
    """Return the names in the inventory of a built site."""
    with (site / "objects.inv").open("rb") as file:
        for _ in range(4):  # its header
            file.readline()
        entries = zlib.decompress(file.read()).decode()
    return {line.split()[0] for line in entries.splitlines()}


def on_post_build(config: Any, **kwargs: Any) -> None:
    """Compare both."""
    if missing := public_names() - documented_names(Path(config.site_dir)):
        raise PluginError(
            f"On no page of docs/api: {', '.join(sorted(missing))}. Add ':::' and the name to one."
        )
