"""Small problems that are solved or not, each hard in one way.

They are in the spirit of HeavyBall's LightBench (github.com/HomebrewML/HeavyBall, benchmark/), of
those problems that need no download.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import Task

SOLUTION = 2**20
"""The seed of solutions, which no run has: its first weights would be the solution."""


class Toy(Task):
    """A problem that is solved once its loss falls to `target`.

    Attributes:
        steps: The number of steps.
        target: The loss at which it is solved.
        samples: The number of samples that the loss averages.
    """

    steps: ClassVar[int] = 500
    target: ClassVar[float] = 1e-4
    samples: ClassVar[int] = 1

    def batches(self, seed: int) -> Iterator[torch.Generator]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield generator

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Return the loss without noise."""
        return self.exact(model).item()

    def loss(self, model: nn.Module, batch: torch.Generator) -> Tensor:
        return self.exact(model)

    @abstractmethod
    def exact(self, model: nn.Module) -> Tensor:
        """Return the loss without noise."""

    @abstractmethod
    def solve(self, model: nn.Module) -> None:
        """Write a solution into the parameters."""


class Values(nn.Module):
    """Tensors to optimize."""

    def __init__(self, **values: Tensor) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value))


def _set(p: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        p.copy_(value)


class Rosenbrock(Toy):
    r"""A curved valley: \((1 - x)^2 + 100 (y - x^2)^2\) in eight pairs."""

    steps = 1000

    def model(self) -> nn.Module:
        return Values(x=torch.tensor([[-1.2, 1.0]]).repeat(8, 1) + 0.1 * torch.randn(8, 2))

    def exact(self, model: nn.Module) -> Tensor:
        x, y = model.get_parameter("x").unbind(1)
        return ((1 - x).square() + 100 * (y - x.square()).square()).mean()

    def solve(self, model: nn.Module) -> None:
        _set(model.get_parameter("x"), torch.ones(8, 2))


class Beale(Toy):
    """Flat plains with a sharp bowl, in eight pairs; the minimum is at (3, 0.5)."""

    def model(self) -> nn.Module:
        return Values(x=torch.tensor([[1.0, 0.8]]).repeat(8, 1) + 0.1 * torch.randn(8, 2))

    def exact(self, model: nn.Module) -> Tensor:
        x, y = model.get_parameter("x").unbind(1)
        terms = [(c - x + x * y**k).square() for k, c in ((1, 1.5), (2, 2.25), (3, 2.625))]
        return torch.stack(terms).sum(0).mean()

    def solve(self, model: nn.Module) -> None:
        _set(model.get_parameter("x"), torch.tensor([[3.0, 0.5]]).repeat(8, 1))


class Scales(Toy):
    """A quadratic whose coordinates differ a million times in curvature."""

    def model(self) -> nn.Module:
        return Values(w=torch.randn(8, 8))

    def exact(self, model: nn.Module) -> Tensor:
        w = model.get_parameter("w").flatten()
        return (torch.logspace(-3, 3, 64) * (w - 1).square()).mean()

    def solve(self, model: nn.Module) -> None:
        _set(model.get_parameter("w"), torch.ones(8, 8))


class Rotated(Toy):
    r"""Least squares \(|A W B - T|^2\) with A and B of condition 100, in rotated coordinates."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(SOLUTION)
        turns = [torch.linalg.qr(torch.randn(12, 12, generator=generator))[0] for _ in range(4)]
        spectrum = torch.logspace(-2, 0, 12)
        self._A, self._B = (left * spectrum @ right for left, right in (turns[:2], turns[2:]))
        self._solution = torch.randn(12, 12, generator=generator)

    def model(self) -> nn.Module:
        return Values(w=torch.zeros(12, 12))

    def exact(self, model: nn.Module) -> Tensor:
        missing = model.get_parameter("w") - self._solution
        seen: Tensor = self._A @ missing @ self._B
        return seen.square().mean()

    def solve(self, model: nn.Module) -> None:
        _set(model.get_parameter("w"), self._solution)


class Saddle(Toy):
    r"""\((x^2 - 1)^2 + y^2\), from close to the saddle at the origin."""

    def model(self) -> nn.Module:
        return Values(w=torch.stack([torch.full((8,), 1e-4), torch.ones(8)], 1))

    def exact(self, model: nn.Module) -> Tensor:
        x, y = model.get_parameter("w").unbind(1)
        return ((x.square() - 1).square() + y.square()).mean()

    def solve(self, model: nn.Module) -> None:
        _set(model.get_parameter("w"), torch.tensor([[1.0, 0.0]]).repeat(8, 1))


class Plateau(Toy):
    r"""\(1 - \exp(-|w|^2 / 2)\) per row, from far away, where gradients are 1e-6."""

    def model(self) -> nn.Module:
        return Values(w=2.6 * torch.ones(6, 4))

    def exact(self, model: nn.Module) -> Tensor:
        return (1 - (-model.get_parameter("w").square().sum(1) / 2).exp()).mean()

    def solve(self, model: nn.Module) -> None:
        _set(model.get_parameter("w"), torch.zeros(6, 4))


class Corners(Toy):
    r"""The mean of \(|w_{ij} - c_{ij}|\), whose gradient does not fade."""

    target = 1e-2

    def model(self) -> nn.Module:
        return Values(w=torch.randn(8, 8))

    def exact(self, model: nn.Module) -> Tensor:
        centers = torch.linspace(-1, 1, 64).view(8, 8)
        return (model.get_parameter("w") - centers).abs().mean()

    def solve(self, model: nn.Module) -> None:
        _set(model.get_parameter("w"), torch.linspace(-1, 1, 64).view(8, 8))


class Noisy(Toy):
    """Linear regression from eight noisy samples per step; the loss is the error of the weights."""

    target = 2e-3
    samples = 8

    def __init__(self) -> None:
        self._solution = torch.randn(6, 10, generator=torch.Generator().manual_seed(SOLUTION))

    def model(self) -> nn.Module:
        return nn.Linear(10, 6, bias=False)

    def loss(self, model: nn.Module, batch: torch.Generator) -> Tensor:
        x = torch.randn(self.samples, 10, generator=batch)
        noise = 0.3 * torch.randn(self.samples, 6, generator=batch)
        return F.mse_loss(model(x), x @ self._solution.mT + noise)

    def exact(self, model: nn.Module) -> Tensor:
        return (model.get_parameter("weight") - self._solution).square().mean()

    def solve(self, model: nn.Module) -> None:
        _set(model.get_parameter("weight"), self._solution)


class Sparse(Toy):
    """A table of which each step sees two of 16 rows."""

    steps = 800

    def __init__(self) -> None:
        self._solution = torch.randn(16, 8, generator=torch.Generator().manual_seed(SOLUTION))

    def model(self) -> nn.Module:
        return nn.Embedding(16, 8)

    def loss(self, model: nn.Module, batch: torch.Generator) -> Tensor:
        rows = torch.randint(16, (2,), generator=batch)
        return F.mse_loss(model(rows), self._solution[rows])

    def exact(self, model: nn.Module) -> Tensor:
        return (model.get_parameter("weight") - self._solution).square().mean()

    def solve(self, model: nn.Module) -> None:
        _set(model.get_parameter("weight"), self._solution)


class Product(Toy):
    r"""\(|A B - T|^2\) with a factor A that is 1,000 times as large as B at the start."""

    steps = 1000

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(SOLUTION)
        self._A = torch.randn(8, 4, generator=generator)
        self._B = torch.randn(4, 8, generator=generator)

    def model(self) -> nn.Module:
        return Values(a=10 * torch.randn(8, 4), b=0.01 * torch.randn(4, 8))

    def exact(self, model: nn.Module) -> Tensor:
        product = model.get_parameter("a") @ model.get_parameter("b")
        return (product - self._A @ self._B).square().mean()

    def solve(self, model: nn.Module) -> None:
        _set(model.get_parameter("a"), self._A)
        _set(model.get_parameter("b"), self._B)


class Parity(Toy):
    """The parity of six bits, by a network of one hidden layer."""

    steps = 1000
    target = 0.02
    samples = 64

    def __init__(self) -> None:
        bits = (torch.arange(64).unsqueeze(1) >> torch.arange(6)) & 1
        self._inputs, self._labels = 2.0 * bits - 1, (bits.sum(1) % 2).float()

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
        )

    def exact(self, model: nn.Module) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(self._inputs).squeeze(1), self._labels)

    def solve(self, model: nn.Module) -> None:
        # hidden unit k of the first layer says whether at least k + 1 bits are set
        for p in model.parameters():
            _set(p, torch.zeros_like(p))
        first, second, last = (model.get_submodule(name) for name in "024")
        sums = torch.arange(6) * 2.0 - 5  # the sum of the inputs half-way between counts
        with torch.no_grad():
            first.get_parameter("weight")[:6] = 20.0
            first.get_parameter("bias")[:6] = -20.0 * sums
            second.get_parameter("weight")[0, :6] = 10 * (-1.0) ** torch.arange(6)
            second.get_parameter("bias")[0] = -10.0
            last.get_parameter("weight")[0, 0] = 20.0


class Ravine(Toy):
    """Linear regression with inputs that nearly agree, so that its Hessian has condition 1e4."""

    steps = 800
    target = 1e-3
    samples = 32

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(SOLUTION)
        common = torch.randn(32, 1, generator=generator)
        self._inputs = common + 0.01 * torch.randn(32, 8, generator=generator)
        self._targets = self._inputs @ torch.randn(8, 4, generator=generator)

    def model(self) -> nn.Module:
        return Values(w=torch.zeros(8, 4))

    def exact(self, model: nn.Module) -> Tensor:
        return (self._inputs @ model.get_parameter("w") - self._targets).square().mean() * 10

    def solve(self, model: nn.Module) -> None:
        _set(model.get_parameter("w"), torch.linalg.lstsq(self._inputs, self._targets).solution)


TOYS: dict[str, type[Toy]] = {
    cls.__name__.lower(): cls
    for cls in (
        Rosenbrock,
        Beale,
        Scales,
        Rotated,
        Saddle,
        Plateau,
        Corners,
        Noisy,
        Sparse,
        Product,
        Parity,
        Ravine,
    )
}
"""The problems by name."""
