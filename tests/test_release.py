"""The source archive and the wheel: what is in them, and that the wheel works by itself."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import structprecond

ROOT = Path(__file__).resolve().parents[1]

TRAIN = """
import torch
import structprecond
from structprecond import SOAP

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
optimizer, x = SOAP(model, lr=0.01), torch.randn(32, 8)
losses = []
for _ in range(20):
    loss = (model(x) - 1).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 2, losses
print(structprecond.__file__)
"""


def build(source: Path, folder: Path, *formats: str) -> None:
    """Build archives with the setuptools of this environment, so that no network is needed."""
    command = [sys.executable, "-m", "build", "--no-isolation", *formats, "-o", str(folder)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the committed and changed files, since setuptools writes beside its sources."""
    source = tmp_path_factory.mktemp("release") / "source"
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    for name in subprocess.check_output(command, cwd=ROOT, text=True).splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="module")
def archives(source: Path) -> Path:
    """Return the folder with the source archive and the wheel that was built from it."""
    build(source, source.parent / "dist")
    return source.parent / "dist"


@pytest.fixture(scope="module")
def wheel(archives: Path) -> Path:
    (made,) = archives.glob("*.whl")
    return made


def package_files() -> set[str]:
    modules = (ROOT / "structprecond").rglob("*.py")
    return {str(file.relative_to(ROOT)) for file in modules} | {"structprecond/py.typed"}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == package_files()
    assert any(name.endswith("LICENSE") for name in names)


def test_the_source_archive_holds_what_builds_the_wheel(archives: Path) -> None:
    (made,) = archives.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        paths = [Path(entry.name) for entry in archive if entry.isfile()]
    names = {str(path.relative_to(path.parts[0])) for path in paths}
    made_by_setuptools = {name for name in names if ".egg-info/" in name}
    ours = {"README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in", "pyproject.toml"}
    assert names - made_by_setuptools - {"PKG-INFO", "setup.cfg"} == ours | package_files()


def test_both_ways_to_the_wheel_are_the_same(source: Path, wheel: Path, tmp_path: Path) -> None:
    build(source, tmp_path, "--wheel")
    direct = zipfile.ZipFile(tmp_path / wheel.name)
    through_the_source_archive = zipfile.ZipFile(wheel)
    assert direct.namelist() == through_the_source_archive.namelist()
    for name in direct.namelist():
        assert direct.read(name) == through_the_source_archive.read(name), name


def test_the_metadata_is_that_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
        text = archive.read(name).decode()
    assert f"\nVersion: {structprecond.__version__}\n" in text
    required = re.findall(r"^Requires-Dist: ([a-z]+)[^;\n]*$", text, re.MULTILINE)
    assert sorted(required) == ["einops", "torch"]
    assert "Requires-Python: >=3.11" in text
    extras = re.findall(r"^Provides-Extra: (\S+)$", text, re.MULTILINE)
    assert {"examples", "integrations", "docs", "dev", "bench"} <= set(extras)


def link_with_its_dependencies(name: str, site: Path, linked: set[str]) -> None:
    """Link an installed package into another environment, with all that it depends on."""
    linked.add(name)
    installed = distribution(name)
    for top in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(Path(str(installed.locate_file(top))))
    for line in installed.requires or ():
        needed = Requirement(line)
        if (not needed.marker or needed.marker.evaluate({"extra": ""})) and (
            needed.name not in linked
        ):
            link_with_its_dependencies(needed.name, site, linked)


def test_it_trains_in_an_environment_of_its_dependencies_alone(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env")
    python = str(tmp_path / "env" / "bin" / "python")
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # links are quick, and need no network
    linked: set[str] = set()
    for dependency in ("torch", "einops"):
        link_with_its_dependencies(dependency, site, linked)
    # without an index, pip refuses a wheel that needs more
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index"]
    subprocess.run([*install, "-q", "--no-compile", str(wheel)], check=True, cwd=tmp_path)
    # torch says so where it is installed without NumPy
    warnings = ["-W", "error", "-W", "ignore:Failed to initialize NumPy"]
    command = [python, "-I", *warnings, "-c", TRAIN]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(site / "structprecond" / "__init__.py")
