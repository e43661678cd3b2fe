"""Change the code in small ways and check that the tests notice.

    OMP_NUM_THREADS=1 python tests/mutate.py                        # a sample of all files
    OMP_NUM_THREADS=1 python tests/mutate.py structprecond/linalg   # of some files
    OMP_NUM_THREADS=1 python tests/mutate.py --again survivors.txt  # those that a run printed

A mutant is one change of one file: an operator or the arguments of a call swapped, a number moved
by one or made zero, a condition negated, a statement or a method call removed, a result dropped.
It is killed if a test fails or takes too long. Docstrings, annotations, messages of errors and
signatures of optimizers stay as they are. The sample depends on nothing but the seed and the
sources. Works on a copy; each mutant runs in a fork of a process that has imported torch.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# imported once, for all forks
import einops  # noqa: F401
import numpy as np  # noqa: F401
import pytest
import torch.distributed.tensor
import torch.utils._python_dispatch  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["linalg", "structures", "strategies"]
COPIED = ["structprecond", "tests", "examples", "benchmarks", "conftest.py", "pyproject.toml"]
FEWEST = 10
MEMORY = 24 * 2**30

# The tests of a file besides its own examples, the most specific first.
LINALG = ["linalg/test_eigen.py", "linalg/test_roots.py", "linalg/test_polar.py"]
QR = ["linalg/test_qr.py", "linalg/test_eigen.py"]
STRUCTURES = ["structures/test_spec.py", "structures/test_contract.py", "structures/test_memory.py"]
KRONECKER = ["strategies/test_soap.py", "strategies/test_shampoo.py", "strategies/test_kl.py"]
PROTOCOL = ["strategies/test_protocol_of_all.py"]
BAD_INPUT = [
    "core/test_bad_arguments.py",
    "core/test_bad_constructor.py",
    "core/test_bad_hyperparameters.py",
    "core/test_bad_params.py",
    "core/test_bad_steps.py",
]
TESTS = {
    "linalg": LINALG,
    "structures": STRUCTURES,
    "linalg/cholesky_qr": QR,
    "linalg/null_space": ["linalg/test_null_space.py", *LINALG, *KRONECKER],
    "linalg/settings": ["linalg/test_settings.py", "linalg/test_precision.py"],
    "linalg/precision": ["linalg/test_precision.py", *LINALG],
    "linalg/product": ["linalg/test_product.py"],
    "linalg/qr": QR,
    "linalg/symmetric": ["linalg/test_symmetric.py", "linalg/test_polar.py"],
    "structures/block_diagonal": STRUCTURES + KRONECKER,
    "structures/blockwise": [*STRUCTURES[1:2], *KRONECKER],
    "structures/dense": STRUCTURES + KRONECKER,
    "structures/diagonal": STRUCTURES + KRONECKER,
    "structures/mode_product": ["structures/test_mode_product.py", *KRONECKER],
    "structures/toeplitz": [*STRUCTURES, "structures/test_toeplitz.py"],
    "strategies/adamw": ["strategies/test_adamw.py", *PROTOCOL],
    "core/strategy": [
        "core/test_random_numbers.py",
        "strategies/test_adamw.py",
        "strategies/test_muon.py",
        *KRONECKER,
        *BAD_INPUT,
        *PROTOCOL,
    ],
    "strategies/auxiliary": ["strategies/test_muon.py", *BAD_INPUT, *PROTOCOL],
    "strategies/kl": ["strategies/test_kl.py", *BAD_INPUT, *PROTOCOL],
    "strategies/lars": ["strategies/test_lars.py", *BAD_INPUT, *PROTOCOL],
    "strategies/moments": ["strategies/test_adamw.py", *KRONECKER, *BAD_INPUT, *PROTOCOL],
    "strategies/muon": ["strategies/test_muon.py", *BAD_INPUT, *PROTOCOL],
    "strategies/orthogonalized": ["strategies/test_muon.py", *BAD_INPUT, *PROTOCOL],
    "strategies/rotation": [
        *KRONECKER,
        *BAD_INPUT,
        *PROTOCOL,
        "core/test_faults.py",
        "core/test_overflow.py",
    ],
    "strategies/scion": ["strategies/test_muon.py", *BAD_INPUT, *PROTOCOL],
    "strategies/shampoo": ["strategies/test_shampoo.py", *BAD_INPUT, *PROTOCOL],
    "strategies/sirf": ["strategies/test_sirf.py", *BAD_INPUT, *PROTOCOL],
    "strategies/soap": ["strategies/test_soap.py", *BAD_INPUT, *PROTOCOL],
}

SWAPS: dict[type[ast.AST], list[type[ast.AST]]] = {
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div],
    ast.Div: [ast.Mult],
    ast.FloorDiv: [ast.Mult],
    ast.Mod: [ast.Mult],
    ast.Pow: [ast.Mult],
    ast.LShift: [ast.RShift],
    ast.BitOr: [ast.BitAnd],
    ast.BitAnd: [ast.BitOr],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
    ast.Lt: [ast.LtE, ast.Gt],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.Lt],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}


@dataclass(frozen=True)
class Mutant:
    """One change: a range of bytes of a file, and its replacement."""

    path: str
    line: int
    column: int
    start: int
    stop: int
    old: str
    new: str

    def __str__(self) -> str:
        """Return one line: the place, the old code and the new code."""
        old = " ".join(self.old.split())
        return f"{self.path}:{self.line}:{self.column}: {old}  ->  {self.new}"


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """Return the possible replacements of a node."""
    match node:
        case ast.BinOp(left, ast.MatMult(), right):
            yield ast.BinOp(right, ast.MatMult(), left)
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op):
            for other in SWAPS.get(type(op), []):
                yield _with(node, op=other())
        case ast.Compare(ops=ops):
            for i, compared in enumerate(ops):
                for other in SWAPS[type(compared)]:
                    yield _with(node, ops=[*ops[:i], other(), *ops[i + 1 :]])
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            for number in dict.fromkeys((value + 1, value - 1, 0)):
                if number != value:
                    yield ast.Constant(number)
        case ast.Constant(float(real)):
            for moved in (2 * real, 0.0):
                if moved != real:
                    yield ast.Constant(moved)
        case ast.IfExp(test, body, orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Slice(lower, upper) if lower or upper:
            yield _with(node, lower=upper, upper=lower)
        case ast.Attribute(value, "mT"):
            yield value
        case ast.Call(func, args):
            bare = not args and not node.keywords
            if isinstance(func, ast.Attribute) and (
                bare or not isinstance(func.value, ast.Name | ast.Call)
            ):
                yield func.value
            symmetric = isinstance(func, ast.Name) and func.id in ("max", "min")
            starred = any(isinstance(a, ast.Starred) for a in args[:2])
            if len(args) > 1 and not starred and not symmetric:
                yield _with(node, args=[args[1], args[0], *args[2:]])
    match node:
        case ast.Expr(ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break():
            yield ast.Pass()
        case ast.Assign([ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()
        case ast.Return(result) if result and not isinstance(result, ast.Constant):
            yield ast.Return(ast.Constant(None))
        case ast.comprehension(ifs=[test]) | ast.If(test) | ast.While(test) | ast.IfExp(test):
            yield test  # replaced by its negation


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def visible(node: ast.AST) -> Iterator[ast.AST]:
    """Return a node and its children, without annotations, messages and the like."""
    yield node
    skipped: set[str] = {"decorator_list", "annotation", "returns", "type_params", "bases"}
    if isinstance(node, ast.FunctionDef):
        skipped.add("args")
    if isinstance(node, ast.ClassDef):
        skipped.add("keywords")
    if isinstance(node, ast.Raise):
        return
    for name, value in ast.iter_fields(node):
        if name in skipped:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
                continue
            if isinstance(child, ast.AnnAssign) and "TypeAlias" in ast.unparse(child.annotation):
                continue
            if isinstance(child, ast.AST):
                yield from visible(child)


def mutants_of(path: str) -> list[Mutant]:
    """Return all mutants of a file."""
    source = (ROOT / path).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: dict[tuple[int, int, str], Mutant] = {}

    def add(node: ast.AST, text: str) -> None:
        start = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        stop = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        old = source[start:stop].decode()
        line, column = node.lineno, node.col_offset + 1  # type: ignore[attr-defined]
        found.setdefault((start, stop, text), Mutant(path, line, column, start, stop, old, text))

    for node in visible(ast.parse(source)):
        for variant in variants(node):
            test = getattr(node, "test", None) or (getattr(node, "ifs", None) or [None])[0]
            text = ast.unparse(variant)
            if text == ast.unparse(node):  # two equal arguments swapped
                continue
            if variant is test:
                add(variant, f"(not ({text}))")
            elif isinstance(node, ast.expr) and not isinstance(node, ast.Slice):
                add(node, f"({text})")
            else:
                add(node, text)
    return sorted(found.values(), key=lambda m: (m.start, m.stop, m.new))


def sample(paths: Sequence[str], total: int, seed: int) -> list[Mutant]:
    """Return about `total` mutants: of each file by its size, but at least a few."""
    mutants = {path: mutants_of(path) for path in paths}
    per_mutant = total / sum(map(len, mutants.values()))
    chosen: list[Mutant] = []
    for path, all_of_it in mutants.items():
        count = min(len(all_of_it), max(FEWEST, round(per_mutant * len(all_of_it))))
        shuffled = random.Random(f"{seed} {path}").sample(all_of_it, len(all_of_it))
        seen: Counter[int] = Counter()
        rounds = []  # one of every line, then a second one of every line, and so on
        for m in shuffled:
            rounds.append((seen[m.line], m))
            seen[m.line] += 1
        picked = [m for _, m in sorted(rounds, key=lambda r: r[0])[:count]]
        chosen += sorted(picked, key=lambda m: (m.start, m.stop, m.new))
    return chosen


def tests_of(path: str) -> list[str]:
    """Return the files to run for a source file."""
    package, module = Path(path).with_suffix("").parts[1:]
    names = TESTS.get(f"{package}/{module}", TESTS.get(package, []))
    return [path, *(f"tests/{name}" for name in names)]


def run_tests(directory: Path, paths: Sequence[str], limit: float, quiet: bool = True) -> bool:
    """Return whether the tests pass in a copy, within a number of seconds."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            os.chdir(directory)
            if quiet:
                null = os.open(os.devnull, os.O_RDWR)
                for stream in (0, 1, 2):
                    os.dup2(null, stream)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            os.environ["PYTHONPATH"] = str(directory)
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            sys.dont_write_bytecode = True
            sys.path.insert(0, str(directory))
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *paths]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    until = time.monotonic() + limit
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
    else:
        status = 1
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and its children
    if not done:
        os.waitpid(child, 0)
    return status == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="*", default=[f"structprecond/{p}" for p in PACKAGES])
    parser.add_argument("--mutants", type=int, default=300, help="about so many in total")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=Path, help="the mutants that stand in this file")
    parser.add_argument("--list", action="store_true", help="print them and do nothing else")
    given = parser.parse_args()

    every = (p for pkg in PACKAGES for p in sorted((ROOT / "structprecond" / pkg).glob("*.py")))
    names = [str(p.relative_to(ROOT)) for p in every]
    names = [name for name in names if mutants_of(name)]
    # the sample of a file does not depend on other files
    chosen = sample(names, given.mutants, given.seed)
    if given.again:
        wanted = {line.removeprefix("SURVIVED ").strip() for line in given.again.open()}
        chosen = [m for name in names for m in mutants_of(name) if str(m) in wanted]
    chosen = [m for m in chosen if any(m.path.startswith(p) for p in given.paths)]
    if given.list:
        print(*chosen, sep="\n")
        return

    table: dict[str, tuple[int, int]] = {}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        for name in COPIED:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
                shutil.copytree(ROOT / name, directory / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, directory / name)
        for path in dict.fromkeys(m.path for m in chosen):
            source, target, tests = (ROOT / path).read_bytes(), directory / path, tests_of(path)
            start = time.monotonic()
            if not run_tests(directory, tests, limit=600, quiet=False):
                raise SystemExit(f"The tests of {path} fail without any change: {tests}")
            limit = 20 + 3 * (time.monotonic() - start)
            target.write_bytes(source + b"\nraise RuntimeError\n")
            if run_tests(directory, tests, limit):
                raise SystemExit(f"The tests of {path} test something else: {tests}")
            mutants = [m for m in chosen if m.path == path]
            killed = 0
            for m in mutants:
                target.write_bytes(source[: m.start] + m.new.encode() + source[m.stop :])
                if run_tests(directory, tests, limit):
                    print("SURVIVED", m, flush=True)
                else:
                    killed += 1
            target.write_bytes(source)
            table[path] = killed, len(mutants)
            seconds = time.monotonic() - begun
            print(f"# {path}: {killed}/{len(mutants)}, {seconds:.0f} s so far", flush=True)

    print(f"\n{'file':48}{'killed':>8}{'total':>8}")
    for package in PACKAGES:
        rows = {p: row for p, row in table.items() if Path(p).parts[1] == package}
        for path, (killed, total) in rows.items():
            print(f"{path:48}{killed:8}{total:8}")
        if rows:
            killed, total = (sum(column) for column in zip(*rows.values(), strict=True))
            print(f"{package + ' in all':48}{killed:8}{total:8}  {killed / total:.0%}")


if __name__ == "__main__":
    main()
