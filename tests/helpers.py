"""Shared by the tests: small models, copies, comparisons, and a dense SIRF-Shampoo."""

from __future__ import annotations

import copy
import io
import pickle
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from structprecond import (
    Hyperparameter,
    SIRFShampoo,
    State,
    StepContext,
    Strategy,
    StructPrecondError,
    StructuredOptimizer,
)
from structprecond.testing.comparing import same_bits as same_bits
from structprecond.testing.models import set_grads as set_grads

Split = Callable[[list[Tensor]], list[Tensor]]
"""From the tensors of a unit to its independent problems, or back."""

SETTINGS: dict[str, Any] = {
    "lr": 0.05, "beta2": 0.1, "alpha1": 0.9, "alpha2": 0.5, "lam": 0.1, "kappa": 0.02
}  # fmt: skip
"""Hyperparameters of SIRF-Shampoo under which every term of its rule is felt within a few steps."""


# --- training ------------------------------------------------------------------------------------


def mlp(dtype: torch.dtype = torch.float64) -> Any:
    """Return an `nn.Sequential` with several parameters of one shape."""
    sizes = [(3, 4), (4, 4), (4, 4), (4, 2)]
    layers = [layer for n, m in sizes for layer in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def net() -> nn.Sequential:
    """Return a model with parameters of one, two and three axes."""
    return nn.Sequential(nn.Linear(3, 4), nn.Conv1d(4, 2, 3), nn.LayerNorm(2))


def two_layers() -> nn.Sequential:
    """Return a model from 3 numbers to 2."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def points(samples: int) -> Tensor:
    """Return inputs of `two_layers`."""
    return torch.randn(samples, 3)


def matrices(count: int = 4) -> nn.ParameterList:
    """Return matrices of one shape, which share a stack."""
    generator = torch.Generator().manual_seed(0)
    # of even order, so that all blocks have the same size
    return nn.ParameterList([torch.randn(6, 4, generator=generator) for _ in range(count)])


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Split the parameters of `mlp` into two groups, neither in model order nor by shape."""
    params = list(model.parameters())
    return [
        {"params": [params[4], params[1], params[0]], "lr": 0.1},
        {"params": [params[7], params[2], params[6], params[3], params[5]], "lr": 0.02},
    ]


def sirf(model: nn.Module, params: Any = None, **kwargs: Any) -> SIRFShampoo:
    """Return SIRF-Shampoo with `SETTINGS`."""
    return SIRFShampoo(model, params, **SETTINGS | kwargs)


def data(step: int, samples: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return the fixed batch of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    x, y = (torch.randn(samples, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    return x.to(dtype), y.to(dtype)


def loss_of(model: nn.Module, step: int, samples: int = 6) -> Tensor:
    """Return the mean loss of a step's batch."""
    dtype = next(p.dtype for p in model.parameters())
    x, y = data(step, samples, dtype)
    loss: Tensor = (model(x) - y).square().sum(1).mean()
    return loss


def backward(model: nn.Module, step: int, samples: int = 6) -> Tensor:
    """Compute the gradients of the mean loss of a step's batch."""
    loss = loss_of(model, step, samples)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    """Train on the batches of the steps from `start` on."""
    for step in range(start, start + steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def spoil(p: Tensor, value: float) -> None:
    """Replace the last entry of a gradient."""
    assert p.grad is not None
    p.grad.view(-1)[-1] = value


# --- copying -------------------------------------------------------------------------------------


def through_a_file(value: Any) -> Any:
    """Save and load with torch's defaults, which do not trust the file."""
    return torch.load(io.BytesIO(saved_bytes(value)))


def saved_bytes(value: Any) -> bytes:
    """Return the bytes that `torch.save` writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def by_pickle(value: Any) -> Any:
    """Copy objects by `pickle`."""
    return pickle.loads(pickle.dumps(value))


def by_file(value: Any) -> Any:
    """Copy objects by `torch.save`."""
    return torch.load(io.BytesIO(saved_bytes(value)), weights_only=False)


COPIERS = [copy.deepcopy, by_pickle, by_file]
"""All ways to copy objects of any kind."""


# --- comparing -----------------------------------------------------------------------------------


def snapshot(model: nn.Module, optimizer: StructuredOptimizer) -> dict[str, Any]:
    """Copy all that a step may change: parameters, state (stacks and views), param groups."""
    entries = [(name, p) for name, p in model.named_parameters() if p in optimizer.state]
    return {
        "params": {name: p.detach().clone() for name, p in model.named_parameters()},
        "shown": {n: {k: t.clone() for k, t in optimizer.state[p].items()} for n, p in entries},
        "stacks": [{k: t.clone() for k, t in b.named_tensors().items()} for b in optimizer.buckets],
        "groups": [copy.copy({**g, "params": list(g["params"])}) for g in optimizer.param_groups],
        "counters": (optimizer.global_step, optimizer.batch_size, optimizer.skipped),
    }


def assert_refused(make: Callable[[nn.Module], Any], message: str) -> None:
    """Check that a function raises and leaves a model unchanged."""
    model = net()
    before = values(model)
    with pytest.raises(StructPrecondError, match=f"(?s){message}"):
        make(model)
    assert same_bits(values(model), before)
    assert not model._forward_hooks
    assert all(p.requires_grad for p in model.parameters())


def values(model: nn.Module) -> list[Tensor]:
    """Copy the parameters."""
    return [p.detach().clone() for p in model.parameters()]


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Compare tensors, or lists of them, relative to the largest entry."""
    if isinstance(actual, Tensor):
        actual, expected = [actual], [expected]
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        scale = e.abs().max().item() if e.numel() else 0.0
        assert (a - e).abs().sum().item() <= tolerance * max(scale, 1e-3) * max(e.numel(), 1)


# --- SIRF-Shampoo by the book --------------------------------------------------------------------


def along(axis: int, matrix: Tensor, tensor: Tensor) -> Tensor:
    """Multiply one axis of a tensor by a matrix."""
    axes = string.ascii_lowercase[: tensor.ndim]
    return torch.einsum(f"Z{axes[axis]},{axes}->{axes.replace(axes[axis], 'Z')}", matrix, tensor)


class DenseSIRF:
    """One problem of SIRF-Shampoo, as published: dense matrices, nothing stacked."""

    def __init__(self, shape: Sequence[int], structures: Sequence[str]) -> None:
        self.dims, self.structures = list(shape), structures
        self.K = [torch.eye(d, dtype=torch.float64) for d in shape]
        self.m = [torch.zeros(d, d, dtype=torch.float64) for d in shape]
        self.buf = torch.zeros(*shape, dtype=torch.float64)

    def _project(self, k: int, matrix: Tensor) -> Tensor:
        return torch.diag(torch.diag(matrix)) if self.structures[k] == "diagonal" else matrix

    def refresh(self, G: Tensor, b: int, hp: dict[str, float]) -> None:
        """Update the factors."""
        H = sqrt(b) * G
        for k, d in enumerate(self.dims):
            H = along(k, self.K[k].T / sqrt(d), H)
        A = [self._project(k, self.K[k].T @ self.K[k]) / d for k, d in enumerate(self.dims)]
        t = [(torch.trace(a) / d).item() for a, d in zip(A, self.dims, strict=True)]
        K = list(self.K)
        for k, d in enumerate(self.dims):
            if self.structures[k] == "none":
                continue
            others = prod(t[j] for j in range(len(t)) if j != k)
            H_k = H.movedim(k, 0).reshape(d, -1)
            step = hp["lam"] / 2 * prod(self.dims) * others * A[k]
            step = step + d / 2 * self._project(k, H_k @ H_k.T) - torch.eye(d).double() / 2
            self.m[k] = hp["alpha2"] * self.m[k] + (1 - hp["alpha2"]) * step
            norm = max(1.0, torch.linalg.matrix_norm(self.m[k]).item())
            K[k] = self.K[k] - hp["beta2"] / norm * self.K[k] @ self.m[k]
        self.K = K

    def direction(self, G: Tensor, p: Tensor, hp: dict[str, float]) -> Tensor:
        """Return the update direction."""
        U = G
        for k in range(len(self.dims)):
            U = along(k, self.K[k] @ self.K[k].T, U)
        self.buf = hp["alpha1"] * self.buf + U + hp["kappa"] * p
        return self.buf


def squeezed(tensors: list[Tensor]) -> list[Tensor]:
    """Make each parameter a unit, without axes of size 1."""
    (tensor,) = tensors
    return [tensor.reshape([n for n in tensor.shape if n != 1] or [1])]


class DenseUnit:
    """Parameters that form problems together, trained by `DenseSIRF`.

    Args:
        params: The parameters, from a separate model.
        split: Maps tensors shaped like the parameters to problems: the grouping in plain torch.
        join: The inverse of split. Default: reshape the only problem to the only parameter.
        structures: The structures of the axes, dense for matrices, diagonal for vectors by default.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        split: Split = squeezed,
        join: Split | None = None,
        structures: Sequence[str] | None = None,
    ) -> None:
        self.params, self.split = list(params), split
        self.join = join or (lambda problems: [problems[0].reshape(self.params[0].shape)])
        shapes = [problem.shape for problem in split([p.detach() for p in params])]
        self.problems = [
            DenseSIRF(s, structures or (["dense"] * len(s) if len(s) > 1 else ["diagonal"]))
            for s in shapes
        ]

    @torch.no_grad()
    def step(self, batch_size: int, refresh: bool = True, **hp: float) -> None:
        """Make one step with the gradients of the parameters."""
        hp = SETTINGS | hp
        grads = self.split([p.grad for p in self.params if p.grad is not None])
        now = self.split([p.detach() for p in self.params])
        directions = []
        for problem, G, p in zip(self.problems, grads, now, strict=True):
            if refresh:
                problem.refresh(G, batch_size, hp)
            directions.append(problem.direction(G, p, hp))
        for p, direction in zip(self.params, self.join(directions), strict=True):
            p -= hp["lr"] * direction


def dense_units(model: nn.Module) -> list[DenseUnit]:
    """Make every parameter of a model a unit."""
    return [DenseUnit([p]) for p in model.parameters()]


def linear_unit(layer: nn.Linear) -> DenseUnit:
    """Make a linear layer one unit: its weight, with the bias as last column."""

    def split(tensors: list[Tensor]) -> list[Tensor]:
        return squeezed([torch.cat([tensors[0], tensors[1][:, None]], dim=1)])

    def join(problems: list[Tensor]) -> list[Tensor]:
        matrix = problems[0].reshape(layer.out_features, layer.in_features + 1)
        return [matrix[:, :-1], matrix[:, -1]]

    return DenseUnit([layer.weight, layer.bias], split, join)


def train_dense(model: nn.Module, dense: list[DenseUnit], steps: int, start: int = 0) -> None:
    """Train the units of a model as `train` does."""
    for step in range(start, start + steps):
        model.zero_grad()
        backward(model, step)
        for unit in dense:
            unit.step(6)


# --- small strategies ----------------------------------------------------------------------------


@dataclass
class Nothing(State):
    """An empty state."""


@dataclass(frozen=True)
class PlainDescent(Strategy[Nothing]):
    """Gradient descent with decoupled weight decay."""

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "lr": Hyperparameter(0.1, lambda v: v >= 0, "at least 0"),
        "weight_decay": Hyperparameter(0.0, lambda v: v >= 0, "at least 0"),
    }

    def init(self, like: Tensor, structures: Any, dtypes: Any) -> Nothing:
        return Nothing()

    def update(
        self, state: Nothing, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext
    ) -> Tensor:
        return grad


@dataclass(frozen=True)
class WithBetas(PlainDescent):
    """A strategy with a pair of numbers among its hyperparameters."""

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        **PlainDescent.hyperparameters,
        "betas": Hyperparameter((0.9, 0.99), lambda v: len(v) == 2, "a pair"),
    }
    decay = "after"
    amount: int = 1


def with_betas(strategy: Strategy[Any], **hyperparameters: Any) -> StructuredOptimizer:
    """Return an optimizer of `mlp` with `WithBetas`."""
    return StructuredOptimizer(mlp(), strategy=strategy, hyperparameters=hyperparameters)


# --- memory --------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Records the largest tensor with memory that an operation returns.

    But for `torch.empty`: what is never written to takes no memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        # kept, so that their addresses are not used again
        self.untouched: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and not t.is_meta:
                storage = t.untyped_storage()
                if "empty" in str(func):
                    self.untouched[storage.data_ptr()] = storage
                if storage.data_ptr() not in self.untouched:
                    self.largest = max(self.largest, storage.nbytes())
        return result
