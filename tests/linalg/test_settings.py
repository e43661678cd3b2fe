"""Settings of the process: simultaneous requests of threads, and restored values."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from itertools import product
from pathlib import Path

import pytest
import torch

from structprecond import StructPrecondError
from structprecond.linalg import precision
from structprecond.linalg.precision import fast_float32, full_precision, reduced_precision
from structprecond.linalg.settings import Setting

Context = Callable[[], AbstractContextManager[None]]
needs_separate_settings = pytest.mark.skipif(
    not hasattr(torch._C, "_get_fp32_precision_getter"), reason="torch 2.9 separated the settings"
)
PRODUCTS = ("cuda", "matmul"), ("mkldnn", "matmul")
PARENTS = ("cuda", "all"), ("mkldnn", "all"), ("generic", "all")
VALUES = "none", "tf32", "ieee"


class OtherThread(ExitStack):
    """Enters and leaves contexts in another thread."""

    def __init__(self) -> None:
        super().__init__()
        self._executor = ThreadPoolExecutor(1)

    def enter_context(self, cm: AbstractContextManager[None]) -> None:  # type: ignore[override]
        self._executor.submit(super().enter_context, cm).result()

    def close(self) -> None:
        self._executor.submit(super().close).result()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    """Return a fake setting of CUDA, so that the real one does not change."""
    written, on_cpu = ["none"], ["none"]
    setting = Setting(lambda: written[-1], written.append)
    monkeypatch.setattr(precision, "_SEPARATE", True)
    monkeypatch.setattr(precision, "_CUDA", setting)
    # some CPUs have a faster setting that keeps float32, which contexts then make
    monkeypatch.setattr(precision, "_CPU", Setting(lambda: on_cpu[-1], on_cpu.append))
    yield setting
    assert on_cpu[-1] == "none"


@pytest.fixture
def real() -> Iterator[None]:
    yield
    for place in (*PRODUCTS, *PARENTS):
        _write(place, "none")


def _read(place: tuple[str, str]) -> str:
    return torch._C._get_fp32_precision_getter(*place)


def _write(place: tuple[str, str], value: str) -> None:
    torch._C._set_fp32_precision_setter(*place, value)


# --- several threads -----------------------------------------------------------------------------


@pytest.mark.parametrize("mine_first", [False, True])
@pytest.mark.parametrize("mine_leaves_first", [False, True])
@pytest.mark.parametrize(
    ("outside", "mine", "theirs", "both"),
    [
        ("none", full_precision, reduced_precision, "ieee"),
        ("tf32", full_precision, reduced_precision, "ieee"),
        ("tf32", full_precision, fast_float32, "ieee"),
        ("none", full_precision, full_precision, "ieee"),
        ("none", reduced_precision, reduced_precision, "tf32"),
        # a thread whose context requests nothing needs the outer value
        ("none", reduced_precision, fast_float32, "none"),
        ("ieee", reduced_precision, fast_float32, "ieee"),
        ("tf32", reduced_precision, fast_float32, "tf32"),
    ],
)
def test_the_most_precise_wish_counts_while_two_threads_are_inside(
    cuda: Setting,
    outside: str,
    mine: Context,
    theirs: Context,
    both: str,
    mine_first: bool,
    mine_leaves_first: bool,
) -> None:
    cuda.write(outside)
    alone: dict[Context, str] = {
        full_precision: "ieee",
        reduced_precision: "tf32",
        fast_float32: outside,
    }
    stack, other = ExitStack(), OtherThread()
    entries = [(stack, mine), (other, theirs)]
    first, second = entries if mine_first else reversed(entries)
    first[0].enter_context(first[1]())
    assert cuda.read() == alone[first[1]]
    second[0].enter_context(second[1]())
    assert cuda.read() == both
    (stack if mine_leaves_first else other).close()
    assert cuda.read() == alone[theirs if mine_leaves_first else mine]
    (other if mine_leaves_first else stack).close()
    assert cuda.read() == outside


@pytest.mark.parametrize(("outside", "both"), [("medium", "high"), ("highest", "highest")])
def test_the_single_setting_of_older_versions_is_shared_alike(
    outside: str, both: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = [outside]
    monkeypatch.setattr(precision, "_SEPARATE", False)
    monkeypatch.setattr(precision, "_LEGACY", Setting(lambda: written[-1], written.append))
    other = OtherThread()
    other.enter_context(reduced_precision())
    with fast_float32():
        assert written[-1] == both
        with full_precision():
            assert written[-1] == "highest"
    assert written[-1] == "high"
    other.close()
    assert written[-1] == outside


def test_the_innermost_wish_of_each_thread_counts(cuda: Setting) -> None:
    other = OtherThread()
    other.enter_context(full_precision())
    other.enter_context(reduced_precision())
    assert cuda.read() == "tf32"
    with reduced_precision(), fast_float32():
        assert cuda.read() == "tf32"
        with full_precision():
            assert cuda.read() == "ieee"
            with reduced_precision():
                assert cuda.read() == "tf32"
    other.close()
    assert cuda.read() == "none"


@needs_separate_settings
@pytest.mark.usefixtures("real")
def test_threads_that_race_get_what_they_ask_for_and_change_nothing_for_good() -> None:
    for place, value in zip(PRODUCTS, ("tf32", "none"), strict=True):
        _write(place, value)
    interval = sys.getswitchinterval()

    def run(seed: int) -> list[str]:
        seen = []
        for i in range(400):
            with reduced_precision() if (seed + i) % 2 else full_precision():
                with full_precision():
                    seen.append(_read(PRODUCTS[0]))
                if (seed + i) % 2 == 0:
                    seen.append(_read(PRODUCTS[0]))
        return seen

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as executor:
            seen = [value for values in executor.map(run, range(3)) for value in values]
    finally:
        sys.setswitchinterval(interval)
    assert set(seen) == {"ieee"}
    assert [*map(_read, PRODUCTS)] == ["tf32", "none"]


FORK = """
import os, sys, warnings
from tests.linalg.test_settings import OtherThread, PRODUCTS, _read
from structprecond.linalg import full_precision
from structprecond.linalg.precision import reduced_precision
warnings.simplefilter("ignore")
before = [*map(_read, PRODUCTS)]
other = OtherThread()
with reduced_precision():
    other.enter_context(full_precision())
    child = os.fork()
    if child == 0:
        good = _read(PRODUCTS[0]) == "tf32"
if child == 0:
    os._exit(0 if good and [*map(_read, PRODUCTS)] == before else 1)
other.close()
assert [*map(_read, PRODUCTS)] == before
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@needs_separate_settings
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_process_forgets_what_other_threads_wanted() -> None:
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", FORK], check=True, cwd=root, timeout=120)


# --- what comes back -----------------------------------------------------------------------------


@needs_separate_settings
@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("context", [full_precision, reduced_precision, fast_float32])
@pytest.mark.parametrize("backend", ["cuda", "mkldnn"])
def test_settings_go_on_inheriting(context: Context, backend: str) -> None:
    places = [("generic", "all"), (backend, "all"), (backend, "matmul")]

    def behaviour(values: tuple[str, ...], enter: bool) -> list[str]:
        """Return the value read at first, and the values after parents change."""
        for place, value in zip(places, values, strict=True):
            _write(place, value)
        if enter:
            with context(), full_precision():
                pass
        seen = [*map(_read, places)]
        for place, value in product(places[:2], VALUES):
            _write(place, value)
            seen += map(_read, places)
        return seen

    for values in product(VALUES, repeat=3):
        assert behaviour(values, enter=True) == behaviour(values, enter=False)


def test_settings_that_others_make_meanwhile_stay(cuda: Setting) -> None:
    with full_precision():
        cuda.write("tf32")
        with full_precision():
            assert cuda.read() == "ieee"
        assert cuda.read() == "ieee"
    assert cuda.read() == "tf32"
    with full_precision():
        cuda.write("none")
    assert cuda.read() == "none"


def test_contexts_of_generators_may_interleave(cuda: Setting) -> None:
    def inside(context: Context) -> Generator[None, None, None]:
        with context():
            yield

    full, reduced = inside(full_precision), inside(reduced_precision)
    next(full)
    next(reduced)
    full.close()
    assert cuda.read() == "tf32"
    reduced.close()
    assert cuda.read() == "none"


def test_a_decorated_function_is_inside_at_every_call(cuda: Setting) -> None:
    @full_precision()
    def count_down(number: int) -> str:
        """Recur."""
        return count_down(number - 1) if number else cuda.read()

    assert count_down.__doc__ == "Recur."
    assert [count_down(3), cuda.read(), count_down(0), cuda.read()] == ["ieee", "none"] * 2


def test_a_context_is_entered_by_one_at_a_time(cuda: Setting) -> None:
    context = full_precision()
    with context:
        with pytest.raises(StructPrecondError, match="entered already"), context:
            pass
        assert cuda.read() == "ieee"
    with context:
        assert cuda.read() == "ieee"
    assert cuda.read() == "none"


def test_a_setting_that_cannot_be_made_is_no_wish_any_more(cuda: Setting) -> None:
    write = cuda.write

    def refuse(value: str) -> None:
        raise RuntimeError(value)

    cuda.write = refuse
    with pytest.raises(RuntimeError, match="ieee"), full_precision():
        pass
    cuda.write = write
    with reduced_precision():
        assert cuda.read() == "tf32"
    assert cuda.read() == "none"
