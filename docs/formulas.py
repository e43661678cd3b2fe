"""Turns the formulas of the pages into MathML, which browsers show without a script."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_MARKED = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
_NO_TEXT = re.compile(r"<(math|pre|code|script|style)\b.*?</\1>|<[^>]*>", re.DOTALL)
_LATEX = re.compile(r"\\[a-zA-Z()\[\]]+|\$[^$\s][^$\n]*\$")
_UPRIGHT = re.compile(r'(?:<mi mathvariant="normal">\w</mi>){2,}')


def to_mathml(latex: str, display: str = "inline") -> str:
    r"""Return a LaTeX formula as a MathML element.

    Args:
        latex: The formula, without its delimiters.
        display: "inline" or "block". Default: "inline".

    Raises:
        ValueError: If the converter does not know a command, or the formula is no LaTeX.
    """
    try:
        mathml = convert(latex, display=display).replace(r"\_", "_")  # as in \text{max\_skew}
    except Exception as error:  # an unfinished formula ends in errors of many kinds
        raise ValueError(f"The formula {latex!r} cannot be converted: {error!r}") from error
    if unknown := re.search(r"\\\w*", mathml):
        raise ValueError(f"The formula {latex!r} has {unknown[0]!r}, which has no MathML.")
    # a word is one identifier; letter by letter it would be spaced as a product
    return _UPRIGHT.sub(lambda run: f"<mi>{re.sub('<[^>]*>', '', run[0])}</mi>", mathml)


def convert_formulas(html: str) -> str:
    r"""Replace the formulas that Markdown has marked, \( \) and \[ \], by MathML."""

    def one(match: re.Match[str]) -> str:
        formula = unescape(match[2]).strip()
        return to_mathml(formula[2:-2].strip(), "inline" if match[1] == "span" else "block")

    return _MARKED.sub(one, html)


def raw_latex(html: str) -> list[str]:
    """Return what looks like LaTeX in the text of a page, outside code and formulas."""
    return _LATEX.findall(unescape(_NO_TEXT.sub(" ", html)))


def on_page_content(html: str, page: Any, **kwargs: Any) -> str:
    """Convert the formulas of a page, those of docstrings too."""
    try:
        return convert_formulas(html)
    except ValueError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error


def on_post_page(output: str, page: Any, **kwargs: Any) -> str:
    """Refuse a page that shows LaTeX as text."""
    if left := raw_latex(output):
        raise PluginError(f"{page.file.src_uri} shows LaTeX as text: {', '.join(left[:5])}")
    return output
