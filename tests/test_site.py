"""The site: formulas without a script, every public name, pictures of all structures."""

import ast
import importlib
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from structprecond.structures import SUPPORTED_STRUCTURES, structure_class

ROOT = Path(__file__).resolve().parents[1]
FORMULA = re.compile(r"\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


@pytest.fixture
def formulas():
    pytest.importorskip("latex2mathml")
    pytest.importorskip("mkdocs")
    return importlib.import_module("docs.formulas")


def sources():
    """Yield files with texts that become a page."""
    for file in ROOT.glob("docs/**/*.md"):
        yield file.name, file.read_text(encoding="utf-8")
    for file in ROOT.glob("structprecond/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield file.name, node.value


def test_every_formula_becomes_mathml(formulas):
    found = [
        (name, (inline or block).strip())
        for name, text in sources()
        for inline, block in FORMULA.findall(text)
    ]
    assert len(found) > 200
    for name, latex in found:
        mathml = formulas.to_mathml(latex)
        assert mathml.startswith("<math "), (name, latex)
        assert "\\" not in mathml, (name, latex)


def test_words_of_a_formula_are_one_identifier(formulas):
    assert "<mi>sign</mi>" in formulas.to_mathml(r"\mathrm{sign}(x)")
    assert "<mtext>max_skew</mtext>" in formulas.to_mathml(r"\text{max\_skew}")


@pytest.mark.parametrize("latex", [r"\unheardof{x}", r"\left( x"])
def test_formulas_that_cannot_be_converted_are_refused(formulas, latex):
    with pytest.raises(ValueError, match=re.escape(repr(latex))):
        formulas.to_mathml(latex)


def test_marked_formulas_are_converted_where_they_stand(formulas):
    html = 'a <span class="arithmatex">\\(x &lt; y\\)</span> b <code>\\(x\\)</code>'
    converted = formulas.convert_formulas(html)
    assert converted.startswith("a <math ")
    assert "&#x0003C;" in converted
    assert converted.endswith(" b <code>\\(x\\)</code>")
    assert formulas.raw_latex(converted) == []


@pytest.mark.parametrize("text", [r"\(x", r"a \times b", "$x_1$", r"<td>\[</td>"])
def test_latex_that_is_left_as_text_is_found(formulas, text):
    assert formulas.raw_latex(f"<p>{text}</p>")
    assert not formulas.raw_latex(f"<p><code>{text}</code></p>")


def test_public_names_without_an_entry_are_refused(tmp_path):
    pytest.importorskip("mkdocs")
    checks = importlib.import_module("docs.public_names")
    names = sorted(checks.public_names())
    assert {"structprecond.SOAP", "structprecond.linalg.polar_factor"} <= set(names)

    class Config:
        site_dir = tmp_path

    def write(entries):
        lines = "".join(f"{name} py:class 1 page/#$ -\n" for name in entries)
        header = b"# Sphinx inventory version 2\n# \n# \n# \n"
        (tmp_path / "objects.inv").write_bytes(header + zlib.compress(lines.encode()))

    write(names)
    checks.on_post_build(Config)
    write(names[1:])
    with pytest.raises(Exception, match=re.escape(names[0])):
        checks.on_post_build(Config)


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = {page: page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    assert sum(text.count("<math ") for text in pages.values()) > 250
    fetched = re.compile(r'<(?:script|img)[^>]*src="https?:|<link[^>]*stylesheet"? href="https?:')
    assert [page.name for page, text in pages.items() if fetched.search(text)] == []


def test_pictures_of_structures_are_those_of_the_classes():
    pictures = importlib.import_module("docs.pictures")
    page = (ROOT / "docs" / "structures.md").read_text(encoding="utf-8")
    for name in pictures.NAMES:
        assert f"<code>{name}</code><br>{pictures.count(name)} numbers<" in page
        file = pictures.FOLDER / f"{name}.svg"
        assert file.read_text(encoding="utf-8") == pictures.picture(name), file
    drawn = [structure_class(name) for name in pictures.NAMES]
    for known in filter(None, SUPPORTED_STRUCTURES.values()):
        assert any(issubclass(one, known) for one in drawn), known
