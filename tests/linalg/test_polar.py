"""Newton-Schulz iterations against singular value decompositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from structprecond import StructPrecondError
from structprecond.linalg import newton_schulz, polar, polar_factor
from structprecond.linalg.polar import COEFFICIENTS, coefficients_of
from structprecond.linalg.precision import has_native_bfloat16


def _with_singular_values(sigma: Tensor, rows: int, columns: int, seed: int) -> Tensor:
    """Return a float64 matrix with random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    svd = torch.linalg.svd(noise, full_matrices=False)
    return svd.U @ sigma.diag() @ svd.Vh


def _random_matrices() -> list[Tensor]:
    """Return 200 matrices from 3x3 to 400x60 with condition numbers up to 1e6."""
    generator = torch.Generator().manual_seed(0)
    matrices = []
    for seed in range(200):
        rows = int(torch.randint(3, 401, (), generator=generator))
        columns = int(torch.randint(3, 61, (), generator=generator))
        if seed % 2:
            rows, columns = columns, rows
        condition = 6 * torch.rand((), generator=generator, dtype=torch.float64)
        sigma = torch.logspace(0, -float(condition), min(rows, columns), dtype=torch.float64)
        scale = 10 ** (6 * torch.rand((), generator=generator, dtype=torch.float64) - 3)
        matrices.append(scale * _with_singular_values(sigma, rows, columns, seed))
    return matrices


def test_polar_express_brings_singular_values_to_one() -> None:
    counted = 0
    for matrix in _random_matrices():
        svd = torch.linalg.svd(matrix, full_matrices=False)
        found = newton_schulz(matrix.float(), 8, "polar_express").double()
        # the iteration keeps singular vectors, so this is diagonal
        gains = (svd.U.mT @ found @ svd.Vh.mT).diagonal()
        large = 1e-3 * svd.S.norm() <= svd.S
        assert (gains[large] - 1).abs().max() < 0.1
        counted += int(large.sum())
    assert counted > 1000


@pytest.mark.parametrize("coefficients", ["polar_express", "quintic", "simple", "cans"])
@pytest.mark.parametrize("steps", [2, 5, 8])
def test_gram_form_is_the_standard_form(coefficients: str, steps: int) -> None:
    polynomials = coefficients_of(coefficients, steps)  # type: ignore[arg-type]
    for seed, (rows, columns) in enumerate([(3, 9), (20, 60), (60, 120), (60, 400)]):
        sigma = torch.logspace(0, -6, rows, dtype=torch.float64)
        matrix = _with_singular_values(sigma, rows, columns, seed)
        X = polar._normalized(matrix.float()).unsqueeze(0)
        standard, gram = polar._standard(X.clone(), polynomials), polar._gram(X, polynomials)
        assert (gram - standard).norm() < 1e-3 * standard.norm()


@pytest.mark.parametrize("coefficients", ["polar_express", "simple"])
def test_gram_form_rounds_no_worse_than_the_standard_form(coefficients: str) -> None:
    # many steps magnify the rounding errors of tiny singular values in both forms
    polynomials = coefficients_of(coefficients, 16)  # type: ignore[arg-type]
    for seed, (rows, columns) in enumerate([(20, 60), (60, 400)]):
        sigma = torch.logspace(0, -6, rows, dtype=torch.float64)
        X = polar._normalized(_with_singular_values(sigma, rows, columns, seed)).unsqueeze(0)
        exact = polar._standard(X.clone(), polynomials)
        standard = (polar._standard(X.float(), polynomials) - exact).norm()
        gram = (polar._gram(X.float(), polynomials) - exact).norm()
        assert 1e-4 < gram < 2 * standard


def _reference(matrix: Tensor, polynomials: list[tuple[float, float, float]]) -> Tensor:
    """Apply the polynomials to the singular values."""
    svd = torch.linalg.svd(matrix.double(), full_matrices=False)
    sigma = svd.S / svd.S.norm()
    for a, b, c in polynomials:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return svd.U @ sigma.diag() @ svd.Vh


@pytest.mark.parametrize("kind", ["quintic", "cans"])
@pytest.mark.parametrize("shape", [(800, 800), (800, 2600), (2600, 800)])
def test_large_matrices_whose_products_are_halved(shape: tuple[int, int], kind: str) -> None:
    matrix = torch.randn(shape)
    polynomials = list(coefficients_of(kind, 5))  # type: ignore[arg-type]
    expected = _reference(matrix, polynomials)
    found = newton_schulz(matrix, 5, kind).double()  # type: ignore[arg-type]
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9), (5, 40), (40, 5), (1, 7), (7, 1)])
@pytest.mark.parametrize("kind", [*COEFFICIENTS, "custom"])
def test_iterations_apply_their_polynomials(shape: tuple[int, int], kind: str) -> None:
    custom = [(2.0, -1.5, 0.5), (1.5, -0.5, 0.0), (1.875, -1.25, 0.375)]
    steps = {"aol": 4, "custom": 3}.get(kind, 5)
    given = custom if kind == "custom" else list(COEFFICIENTS[kind].steps)
    polynomials = [given[i % len(given)] for i in range(steps)]
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = newton_schulz(matrix, steps, custom if kind == "custom" else kind)  # type: ignore[arg-type]
    assert (found - _reference(matrix, polynomials)).norm() < 1e-10


def test_coefficients_go_on_as_published() -> None:
    assert coefficients_of("simple", 7) == ((3.4445, -4.7750, 2.0315),) * 7
    quintic = coefficients_of("quintic", 7)
    assert quintic[5:] == ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377))
    assert coefficients_of("polar_express", 10)[7:] == ((1.8750, -1.2500, 0.3750),) * 3
    assert coefficients_of("cans", 7)[4:] == ((2.2737, -1.6447, 0.4162),) * 3


@pytest.mark.parametrize(
    ("kind", "lower", "upper", "largest"),
    [
        ("quintic", 0.95, 1.05, 1.0),
        ("polar_express", 0.999, 1.001, 1.0),
        ("cans", 0.85, 1.15, 1.0),
        ("aol", 0.75, 1.15, 0.85),
        ("cubic5", 0.75, 1.3, 1.0),
    ],
)
def test_published_tables_bring_singular_values_near_one(
    kind: str, lower: float, upper: float, largest: float
) -> None:
    # finds wrong numbers in a table; "simple" has one triple and leaves small values small
    sigma = torch.logspace(-2, 0, 300, dtype=torch.float64) * largest
    for a, b, c in COEFFICIENTS[kind].steps:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    assert lower < sigma.min()
    assert sigma.max() < upper


@pytest.mark.parametrize(
    ("kind", "steps", "message"),
    [
        ("cubic5", 4, "exactly 5 steps, got 4"),
        ("cubic5", 6, "exactly 5 steps, got 6"),
        ("aol", 5, "at most 4 steps, got 5"),
        ("quintik", 5, "Unknown Newton-Schulz coefficients 'quintik'. Use simple"),
        ("quintic", 0, "integer of at least 1, got 0"),
        ("quintic", True, "integer of at least 1, got True"),
        ("quintic", 2.5, "integer of at least 1, got 2.5"),
        ([(1.0, 2.0)], 1, "list of triples"),
        ([1.0, 2.0, 3.0], 3, "list of triples"),
        ([(1.5, -0.5, 0.0)], 5, "1 triples of Newton-Schulz coefficients for 5 steps"),
    ],
)
def test_wrong_coefficients_are_refused(kind: object, steps: int, message: str) -> None:
    with pytest.raises(StructPrecondError, match=message):
        newton_schulz(torch.eye(3), steps, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [newton_schulz, polar_factor])
@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(2, 2, dtype=torch.int64)])
def test_what_is_no_stack_of_matrices_is_refused(function: object, wrong: Tensor) -> None:
    with pytest.raises(StructPrecondError, match=r"stacks \(\*b, m, n\) of real matrices"):
        function(wrong)  # type: ignore[operator]


def test_wrong_precision_is_refused() -> None:
    with pytest.raises(StructPrecondError, match="precision must be 'highest'"):
        newton_schulz(torch.eye(3), precision="low")  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
def test_scale_does_not_matter_and_nothing_is_infinite(precision: str, coefficients: str) -> None:
    matrix = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    expected = newton_schulz(matrix, 5, coefficients, precision)  # type: ignore[arg-type]
    for scale in (1e-37, 1e-20, 1e-12, 1e15, 1e37):
        found = newton_schulz(scale * matrix, 5, coefficients, precision)  # type: ignore[arg-type]
        assert torch.allclose(found, expected, atol=2e-2 if precision == "medium" else 1e-4)
    zero = newton_schulz(torch.zeros(4, 24), 5, coefficients, precision)  # type: ignore[arg-type]
    assert torch.equal(zero, torch.zeros(4, 24))
    low_rank = matrix[:, :1] * torch.randn(1, 24)
    assert newton_schulz(low_rank, 8, coefficients, precision).isfinite().all()  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (6, 40)])
@pytest.mark.parametrize(
    ("dtype", "scales", "tolerance"),
    [(torch.float64, (1e200, 1e-200), 1e-12), (torch.float32, (3e37, 1e-37), 1e-5)],
)
def test_scales_whose_squares_are_out_of_range(
    shape: tuple[int, int], dtype: torch.dtype, scales: tuple[float, ...], tolerance: float
) -> None:
    # entries of at least 1/2, so that none becomes subnormal
    entries = 0.5 + torch.rand(shape, dtype=torch.float64)
    matrix = entries * torch.where(torch.rand(shape) < 0.5, -1.0, 1.0)
    U, singular, V = np.linalg.svd(matrix.numpy(), full_matrices=False)
    exact = torch.from_numpy(U @ V)
    fraction = singular / np.linalg.norm(singular)
    for a, b, c in 5 * [(3.4445, -4.7750, 2.0315)]:
        fraction = a * fraction + b * fraction**3 + c * fraction**5
    expected = torch.from_numpy(U * fraction @ V)
    mixed = torch.stack([matrix * scale for scale in (1.0, *scales, 0.0)]).to(dtype)
    for found, target in (
        (polar_factor(mixed), exact),
        (newton_schulz(mixed, 5, "simple"), expected),
    ):
        assert found.dtype == dtype
        assert (found[:3].double() - target).abs().max() < tolerance
        assert torch.equal(found[3], torch.zeros(shape, dtype=dtype))


def test_stacks_are_their_matrices() -> None:
    stack = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    found, exact = newton_schulz(stack), polar_factor(stack)
    for i in range(2):
        for j in range(3):
            assert torch.allclose(found[i, j], newton_schulz(stack[i, j]), atol=1e-12)
            assert torch.allclose(exact[i, j], polar_factor(stack[i, j]), atol=1e-12)
    assert newton_schulz(torch.zeros(0, 3, 4)).shape == (0, 3, 4)
    assert polar_factor(torch.zeros(2, 0, 4)).shape == (2, 0, 4)


def test_input_stays_as_it_is() -> None:
    for shape in ((4, 4), (9, 2), (2, 9)):
        matrix = torch.randn(shape)
        before = matrix.clone()
        newton_schulz(matrix)
        newton_schulz(matrix, precision="medium")
        polar_factor(matrix)
        assert torch.equal(matrix, before)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.bfloat16, 1e-2),
        (torch.float16, 1e-3),
        (torch.float32, 1e-4),
        (torch.float64, 1e-12),
    ],
)
def test_dtype_of_the_input_is_kept(dtype: torch.dtype, tolerance: float) -> None:
    matrix = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = newton_schulz(matrix.double(), 8, "polar_express")
    found = newton_schulz(matrix, 8, "polar_express")
    assert found.dtype == dtype
    assert polar_factor(matrix).dtype == dtype
    assert torch.allclose(found.double(), expected, atol=tolerance)
    tall = newton_schulz(matrix.mT, 8, "polar_express")
    assert tall.dtype == dtype
    assert torch.allclose(tall.double(), expected.mT, atol=tolerance)


def test_float64_is_never_reduced() -> None:
    matrix = torch.randn(6, 8, dtype=torch.float64)
    assert torch.equal(newton_schulz(matrix, precision="medium"), newton_schulz(matrix))


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_is_used_only_where_it_is_native(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polar, "has_native_bfloat16", lambda device: native)
    seen = []
    standard = polar._standard

    def spy(X: Tensor, polynomials: object) -> Tensor:
        seen.append(X.dtype)
        return standard(X, polynomials)  # type: ignore[arg-type]

    monkeypatch.setattr(polar, "_standard", spy)
    newton_schulz(torch.randn(4, 4), precision="medium")
    assert seen == [torch.bfloat16 if native else torch.float32]


def test_native_bfloat16_is_what_the_device_says(monkeypatch: pytest.MonkeyPatch) -> None:
    native = has_native_bfloat16.__wrapped__
    for features, expected in (
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_bf16": False}, False),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda f=features: f, raising=False)
        assert native(torch.device("cpu")) is expected
    # a GPU that only emulates bfloat16
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert native(torch.device("cuda")) is False
    assert native(torch.device("meta")) is False


def test_long_matrices_take_the_gram_form_and_others_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = []
    gram = polar._gram
    monkeypatch.setattr(polar, "_gram", lambda X, p: taken.append(X.shape[1:]) or gram(X, p))  # type: ignore[func-returns-value]
    for shape in ((4, 4), (4, 5), (4, 16), (16, 4)):
        newton_schulz(torch.randn(shape))
    assert taken == [(4, 16), (4, 16)]
    monkeypatch.setattr(polar, "has_native_bfloat16", lambda device: True)
    newton_schulz(torch.randn(4, 16), precision="medium")
    assert len(taken) == 2


def test_polar_factor_drops_directions_without_a_singular_value() -> None:
    sigma = torch.tensor([3.0, 1.0, 1e-3, 0.0], dtype=torch.float64)
    matrix = _with_singular_values(sigma, 4, 7, seed=3)
    svd = torch.linalg.svd(matrix, full_matrices=False)
    expected = svd.U[:, :3] @ svd.Vh[:3]
    assert torch.allclose(polar_factor(matrix), expected, atol=1e-10)
    assert torch.equal(polar_factor(torch.zeros(3, 2)), torch.zeros(3, 2))


@pytest.mark.parametrize("shape", [(40, 2), (2, 40)])
def test_polar_factor_measures_what_is_zero_by_the_longer_side(shape: tuple[int, int]) -> None:
    eps = torch.finfo(torch.float64).eps
    for second, kept in ((20 * eps, 0.0), (80 * eps, 1.0)):
        matrix = torch.zeros(shape, dtype=torch.float64)
        matrix[0, 0], matrix[1, 1] = 1.0, second
        expected = torch.zeros(shape, dtype=torch.float64)
        expected[0, 0], expected[1, 1] = 1.0, kept
        assert torch.allclose(polar_factor(matrix), expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(8, 128, 128), (8, 64, 128), (8, 128, 64)])
def test_bfloat16_is_rounded_only_where_a_matrix_is_stored(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 0.012 as in the published iteration; 0.03 if sums were rounded on the way
    monkeypatch.setattr(polar, "has_native_bfloat16", lambda device: True)
    matrix = torch.randn(shape)
    exact = newton_schulz(matrix.double(), coefficients="simple")
    rounded = newton_schulz(matrix, coefficients="simple", precision="medium")
    assert (rounded - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    "shape", [(2, 64, 64), (2, 64, 100), (2, 100, 64), (2, 64, 300), (3, 5, 4)]
)
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("kind", COEFFICIENTS)
def test_every_polynomial_is_right_in_every_precision(
    kind: str, precision: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polar, "has_native_bfloat16", lambda device: True)
    steps = len(COEFFICIENTS[kind].steps)
    matrix = torch.randn(shape)
    exact = newton_schulz(matrix.double(), steps, kind)  # type: ignore[arg-type]
    found = newton_schulz(matrix, steps, kind, precision)  # type: ignore[arg-type]
    tolerance = 0.3 if precision == "medium" else 1e-3
    assert (found - exact).norm() < tolerance * exact.norm()
