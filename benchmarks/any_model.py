"""Measure what optimizers with their defaults take on models with long axes.

Each optimizer is constructed and makes 12 steps, which include the first eigenbases and a refresh.
The table has the seconds of that, without forward and backward passes; in parentheses the seconds
of all threads, which depend less on what else the machine does; and the bytes of the state divided
by those of the parameters.

    python benchmarks/any_model.py
    python benchmarks/any_model.py --models mnist mixer --optimizers SOAP Shampoo
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from demo import table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import weight_norm

from structprecond import (
    KLSOAP,
    LARS,
    SOAP,
    AdamW,
    KLShampoo,
    Muon,
    NorMuon,
    Scion,
    Shampoo,
    SIRFShampoo,
    describe,
)

STEPS = 12
"""The steps of a run: one with the first eigenbases, and a refresh after ten more."""

BATCH = 8


class Tokens(nn.Module):
    """Turns the pixels of images `(b, channels, height, width)` into tokens `(b, t, channels)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mT


class Transposed(nn.Module):
    """Applies a module along the axis before the last one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.mT).mT
        return out


class Residual(nn.Module):
    """Adds what modules find."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class Gate(nn.Module):
    """Squeeze and excitation: scales channels by what all pixels say."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        out: Tensor = x * self.expand(self.reduce(mean).relu()).sigmoid()
        return out


def mnist() -> nn.Module:
    """Return the network of PyTorch's MNIST example."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9216, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def embedding(vocabulary: int) -> nn.Module:
    """Return an embedding of width 64 with a linear head."""
    return nn.Sequential(nn.Embedding(vocabulary, 64), nn.Linear(64, vocabulary))


def weight_normed() -> nn.Module:
    """Return a layer from 7,200 to 16 features with a weight norm."""
    return nn.Sequential(weight_norm(nn.Linear(7200, 16)))


def _convolution(n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1) -> Any:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(n_out),
        nn.SiLU(),
    )


def efficientnet() -> nn.Module:
    """Return the layers of EfficientNet-B0, with the first strides left out for small images."""
    layers = [_convolution(3, 32, 3)]
    width = 32
    # expansion, width, blocks, kernel, stride
    for expansion, n_out, blocks, kernel, stride in [
        (1, 16, 1, 3, 1),
        (6, 24, 2, 3, 2),
        (6, 40, 2, 5, 2),
        (6, 80, 3, 3, 2),
        (6, 112, 3, 5, 1),
        (6, 192, 4, 5, 2),
        (6, 320, 1, 3, 1),
    ]:
        for block in range(blocks):
            inner = width * expansion
            body = [
                *([_convolution(width, inner, 1)] if expansion > 1 else []),
                _convolution(inner, inner, kernel, stride if block == 0 else 1, groups=inner),
                Gate(inner, max(1, width // 4)),
                nn.Conv2d(inner, n_out, 1, bias=False),
                nn.BatchNorm2d(n_out),
            ]
            layers += [Residual(*body)] if block else body
            width = n_out
    layers += [_convolution(width, 1280, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(1280, 1000))


def mixer(width: int = 256, tokens: int = 64, blocks: int = 6) -> nn.Module:
    """Return an MLP-Mixer on patches of 4x4 pixels."""

    def mlp(n: int, hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(n, hidden), nn.GELU(), nn.Linear(hidden, n))

    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 4), Tokens()]
    for _ in range(blocks):
        layers.append(Residual(nn.LayerNorm(width), Transposed(mlp(tokens, 2 * tokens))))
        layers.append(Residual(nn.LayerNorm(width), mlp(width, 4 * width)))
    return nn.Sequential(*layers, nn.LayerNorm(width), nn.Flatten(), nn.Linear(width * tokens, 10))


@dataclass(frozen=True)
class Case:
    """A model and its input.

    Attributes:
        make: Returns the model.
        shape: The shape of one input; empty for tokens.
        classes: The number of classes, and of tokens.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int


CASES = {
    "mnist": Case(mnist, (1, 28, 28), 10),
    "embedding 50,000x64": Case(partial(embedding, 50_000), (), 50_000),
    "embedding 8,000x64": Case(partial(embedding, 8000), (), 8000),
    "weight norm 7200->16": Case(weight_normed, (7200,), 16),
    "efficientnet": Case(efficientnet, (3, 32, 32), 1000),
    "mixer": Case(mixer, (3, 32, 32), 10),
}

OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    **{make.__name__: make for make in (SOAP, KLSOAP, KLShampoo, Shampoo, SIRFShampoo)},
    **{make.__name__: make for make in (Muon, NorMuon, Scion, AdamW)},
    "LARS": partial(LARS, lr=0.1),
}


@dataclass(frozen=True)
class Result:
    """What one optimizer takes for one model.

    Attributes:
        seconds: The time of construction and of all steps.
        cpu_seconds: The time of all threads for that.
        state: The bytes of the state by those of the parameters.
    """

    seconds: float
    cpu_seconds: float
    state: float


def measure(case: Case, make: Callable[[nn.Module], Any], steps: int = STEPS) -> Result:
    """Construct an optimizer with its defaults and make steps."""
    torch.manual_seed(0)
    model = case.make()
    wall = cpu = 0.0

    def timed(function: Callable[[], Any]) -> Any:
        nonlocal wall, cpu
        start, cpu_start = time.perf_counter(), time.process_time()
        result = function()
        wall += time.perf_counter() - start
        cpu += time.process_time() - cpu_start
        return result

    optimizer = timed(lambda: make(model))
    for _ in range(steps):
        targets = torch.randint(case.classes, (BATCH,))
        inputs = torch.randn(BATCH, *case.shape) if case.shape else targets.roll(1)
        cross_entropy(model(inputs), targets).backward()
        timed(optimizer.step)
        optimizer.zero_grad()
    described = describe(optimizer)
    return Result(wall, cpu, described.state_bytes / described.parameter_bytes)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.models:
        cells = []
        for optimizer in args.optimizers:
            result = measure(CASES[name], OPTIMIZERS[optimizer], args.steps)
            print(f"{name} {optimizer}: {result}", file=sys.stderr)
            cells.append(f"{result.seconds:.1f} ({result.cpu_seconds:.1f}), {result.state:.1f}x")
        rows.append((name, *cells))
    columns = zip(("model", *args.optimizers), *rows, strict=True)
    header, *lines = [tuple(column) for column in columns]
    print(table(header, lines))


if __name__ == "__main__":
    main()
