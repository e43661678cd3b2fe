"""What Kronecker factors cost: warnings before the first step, and the names in memory errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from structprecond.core.bucket import Bucket, BucketKey, compute_dtype
from structprecond.core.naming import describe_shape, enumerate_names, names_of_structures
from structprecond.core.strategy import StepContext, Strategy, interval_of
from structprecond.core.units import Unit
from structprecond.linalg.precision import step_precision
from structprecond.structures import StructuredMatrix

# a unit's state is large if it exceeds both
_LARGE_RATIO, _LARGE_BYTES = 20, 64 * 2**20
# a refresh is slow if it exceeds both; the operations take a second or more on most CPUs
_SLOW_STEPS, _SLOW_OPERATIONS = 100, 1e11
# an ordinary step rotates, rotates back and averages: two operations per entry and row each
_STEP_OPERATIONS = 6
# what a step does for each number of a unit without any factor
_ENTRYWISE_OPERATIONS = 20
# an update that is like most others: moments and factors exist
_USUAL_UPDATE = 10
_MOST_LINES = 5


@lru_cache
def count_entries(structure: type[StructuredMatrix], dim: int) -> int:
    """Return how many numbers a matrix of a structure stores; allocates nothing.

    Example:
        >>> from structprecond import DenseMatrix
        >>> count_entries(DenseMatrix, 10**6)
        1000000000000
    """
    try:
        made = structure.zeros(dim, device="meta")
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        # a user's `from_dense` may look at values; at most, it keeps all of them
        return dim**2
    return sum(t.numel() for t in made.named_tensors().values())


def step_operations(strategy: Strategy[Any], key: BucketKey) -> int:
    r"""Return about how many operations an ordinary step of one row takes.

    These are 20 for each number of the row, and the products of an update without refresh, counted
    by torch while the update runs on the meta device. If a strategy cannot run there, they are
    taken to be \(\sum_k 6 D e_k / d_k\) for D numbers and factors that store \(e_k\) each; dense
    ones have \(e_k = d_k^2\).
    """
    return _ENTRYWISE_OPERATIONS * key.shape.numel() + product_operations(strategy, key)


@lru_cache(maxsize=2**12)
def product_operations(strategy: Strategy[Any], key: BucketKey) -> int:
    """Return how many operations the matrix products of an ordinary step of one row take."""
    shape, dtype = (1, *key.shape), compute_dtype(key.param_dtype)
    try:
        # precision first: on some CPUs, the first use of it multiplies matrices to check it
        with step_precision(), torch.device("meta"), FlopCounterMode(display=False) as counted:
            grad = torch.empty(shape, dtype=dtype)
            state = strategy.init(grad, key.structures, key.dtypes)
            context = StepContext(
                _USUAL_UPDATE,
                seeds=torch.zeros(1, dtype=torch.int64, device="cpu"),
                due=None,
                failed=torch.zeros(1, dtype=torch.bool, device="cpu"),
                global_step=_USUAL_UPDATE,
                batch_size=1,
                params=partial(torch.empty, shape, dtype=dtype),
                ndim=len(shape),
                dtype=dtype,
                device=grad.device,
            )
            defaults = {name: h.default for name, h in strategy.hyperparameters.items()}
            strategy.update(state, grad, defaults, context)
    except Exception:  # anything that a user's strategy may do with values, of which there are none
        axes = zip(key.structures, key.shape, strict=True)
        per_entry = sum(count_entries(s, dim) / dim for s, dim in axes if s is not None and dim)
        return round(_STEP_OPERATIONS * key.shape.numel() * per_entry)
    return int(counted.get_total_flops())


def refresh_operations(strategy: Strategy[Any], key: BucketKey) -> int:
    """Return about how many operations a refresh of one row takes."""
    name = interval_of(strategy)
    if name is None:
        return 0
    each = strategy.hyperparameters[name].refresh_operations
    return round((each or 0.0) * key.refresh_cost())


def too_high(buckets: Sequence[Bucket]) -> str | None:
    """Return a warning that names the units with large state or slow refreshes; None without any.

    A unit has large state if that exceeds 64 MiB and 20 times its parameters, in the dtype in which
    it is computed. A refresh is slow if it takes more than 1e11 operations and as many as 100
    ordinary steps.
    """
    found = {bucket: costs for bucket in buckets if (costs := _costs(bucket))}
    if not found:
        return None
    lines = [f"{_describe(bucket.units, bucket.key)}: {costs}" for bucket, costs in found.items()]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"... and {len(lines) - _MOST_LINES} more stacks"]
    remedies = _remedies(list(found), {len(bucket.key.shape) for bucket in buckets})
    return "\n  ".join(["Some Kronecker factors are expensive.", *lines]) + f"\n{remedies}"


def _costs(bucket: Bucket) -> str:
    """Return what is expensive about the units of a bucket, or an empty text."""
    if not any(bucket.key.structures):
        return ""
    parts = []
    state = sum(t.numel() * t.element_size() for t in bucket.state.named_tensors().values())
    per_row = bucket.key.shape.numel() * bucket.dtype.itemsize
    largest = max(unit.rows for unit in bucket.units) * state // bucket.rows
    ratio = state / bucket.rows / per_row
    if largest > _LARGE_BYTES and ratio > _LARGE_RATIO:
        parts.append(f"{largest / 2**20:,.0f} MiB of state, {ratio:,.0f} times the parameter")
    refresh = refresh_operations(bucket.strategy, bucket.key)
    if refresh > _SLOW_OPERATIONS:
        steps = refresh / step_operations(bucket.strategy, bucket.key)
        if steps > _SLOW_STEPS:
            parts.append(f"a refresh takes as long as {steps:,.0f} steps")
    return "; ".join(parts)


def _remedies(expensive: Sequence[Bucket], orders: set[int]) -> str:
    """Return how to make units cheaper."""
    ways = []
    if any(_is_left_out_by_auto(bucket) for bucket in expensive):
        ways.append('give structures="auto"')
    spec: dict[int, Any] = dict.fromkeys(sorted(orders), "auto")
    for bucket in reversed(expensive):  # so that the first one of an order counts
        spec[len(bucket.key.shape)] = _cheaper(bucket.key)
    ways.append(f"name structures by the number of axes, as in structures={quote(spec)}")
    if any(hasattr(bucket.strategy, "max_precond_dim") for bucket in expensive):
        shortest = min(bucket.key.shape[_longest(bucket.key)] for bucket in expensive)
        ways.append(f"set max_precond_dim below {shortest}")
    return f"To leave out the factors of long axes, {', or '.join(ways)}."


def _longest(key: BucketKey) -> int:
    """Return the longest axis that has a factor, or else 0."""
    axes = [axis for axis, structure in enumerate(key.structures) if structure is not None]
    return max(axes, key=lambda axis: key.shape[axis], default=0)


def _is_left_out_by_auto(bucket: Bucket) -> bool:
    axis = _longest(bucket.key)
    usual = bucket.strategy.auto_structures(bucket.key.shape)[axis]
    return usual is not bucket.key.structures[axis]


def _cheaper(key: BucketKey) -> str | tuple[str, ...]:
    """Return the names of the structures of units without the factor of the longest axis."""
    names = list(names_of_structures(key.structures))
    names[_longest(key)] = "none"
    return names[0] if len(names) == 1 else tuple(names)


def quote(spec: Any) -> str:
    """Return a value as users write it in Python, with double quotes."""
    return str(spec).replace("'", '"')


def _describe(units: Sequence[Unit], key: BucketKey) -> str:
    """Return the names of units with their shape and structures."""
    labels = [unit.label for unit in units]
    structures = " ".join(names_of_structures(key.structures))
    return f"{enumerate_names(labels)} ({describe_shape(key.shape)}, {structures})"


@contextmanager
def naming_units(doing: str, units: Sequence[Unit], key: BucketKey) -> Iterator[None]:
    """Let memory errors name the units for which there is no memory.

    They keep their type, and their message as the first lines, since tools that try again with
    smaller batches look at both.

    Args:
        doing: What is done for the units, as in "making the state".
        units: The units.
        key: Their shape and structures.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_about_memory(error):
            raise
        raise type(error)(
            f"{error}\nThis happened while {doing} of {_describe(units, key)}.{_advice(key)}"
        ) from error


def _advice(key: BucketKey) -> str:
    if not any(key.structures):
        return ""
    return (
        f" Leave out the factor of its longest axis, as in structures="
        f"{quote({len(key.shape): _cheaper(key)})}, or choose smaller structures."
    )


def _is_about_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch has no class of its own for the CPU
    return type(error) is RuntimeError and "DefaultCPUAllocator" in str(error)
