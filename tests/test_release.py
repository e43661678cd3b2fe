"""The wheel: what is in it, and that it works away from the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the setuptools of this environment, so that no network is needed."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # from a copy of the committed and changed files, since setuptools writes beside its sources
    listed = subprocess.check_output(
        [
            "git",
            "ls-files",
            "-co",
            "--exclude-standard",
            "structprecond",
            "pyproject.toml",
            "README.md",
            "LICENSE",
        ],
        cwd=ROOT,
        text=True,
    )
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(folder), str(source)], check=True, capture_output=True)
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    files = {name for name in names if ".dist-info/" not in name}
    modules = (ROOT / "structprecond").rglob("*.py")
    expected = {str(file.relative_to(ROOT)) for file in modules} | {"structprecond/py.typed"}
    assert files == expected
    assert any(name.endswith("LICENSE") for name in names)


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


def test_it_trains_where_the_repository_is_not(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-W", "error", "-c", TRAIN]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "site" / "structprecond" / "__init__.py")
