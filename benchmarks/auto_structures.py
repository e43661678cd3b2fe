"""Measure what `structures="auto"` loses or gains by the factors that it leaves out.

Jobs train with all factors dense, and with `"auto"` at several limits: an axis gets no factor if it
is longer than `long` and more than `thin` times as long as all other axes together. Limits that
choose the same factors share their runs. The first two jobs have layers of many lengths and aspect
ratios, so the rule binds; the last two are the models of the examples.

- `language`: the transformer of the examples on pairs of characters, with a vocabulary of 1,536
  (embedding and head: 1536x96) and a first MLP of 1152x96.
- `digits`: a classifier of scikit-learn's digits, 64 - 768 - 160 - 1152 - 96 - 1152 - 10 neurons.
- `demo`: the transformer of the demo.
- `vision`: the convolutional network of the examples on the same digits.

    python benchmarks/auto_structures.py
    python benchmarks/auto_structures.py --jobs digits --optimizers shampoo klshampoo --limits
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from char_lm import VOCABULARY, CharLM, Shape, batches, load_corpus
from demo import table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from training import linear_schedule
from vision import load, network

from structprecond import KLSOAP, SOAP, KLShampoo, Shampoo, SIRFShampoo, describe
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.structures import auto

Batch = tuple[Tensor, Tensor]
DENSE = "dense"
DEFAULT = f"{auto.THIN},{auto.LONG}"
LIMITS = ("4,1024", "16,1024", "8,512", "8,2048")

PAIRS = 1536
LM = Shape(layers=2, width=96, heads=4, context=64, batch=16)
WIDTHS = (64, 768, 160, 1152, 96, 1152, 10)


@dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
        make: Returns the model.
        batches: Returns training batches without end, by seed.
        held_out: Returns batches of other data.
        steps: How long it is trained.
    """

    make: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    held_out: Callable[[], list[Batch]]
    steps: int


@cache
def _pairs() -> Batch:
    """Return the text of the examples as pairs of characters: the 1,535 most frequent, and others.

    Returns:
        Training and validation tokens.
    """
    corpus = load_corpus()

    def pairs(text: Tensor) -> Tensor:
        first, second = text[: len(text) // 2 * 2].long().view(-1, 2).unbind(1)
        return first * VOCABULARY + second

    train = pairs(corpus.train)
    ranked = train.bincount(minlength=VOCABULARY**2).argsort(descending=True)
    token_of = torch.full((VOCABULARY**2,), PAIRS - 1)
    token_of[ranked[: PAIRS - 1]] = torch.arange(PAIRS - 1)
    return token_of[train], token_of[pairs(corpus.validation)]


def _language_model() -> nn.Module:
    model = CharLM(LM)
    model.tokens = nn.Embedding(PAIRS, LM.width)
    model.head = nn.Linear(LM.width, PAIRS, bias=False)
    wide: Any = model.blocks[0]
    wide.mlp = nn.Sequential(
        nn.Linear(LM.width, 12 * LM.width), nn.GELU(), nn.Linear(12 * LM.width, LM.width)
    )
    return model


def _classifier() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for n_in, n_out in pairwise(WIDTHS):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _digits(seed: int) -> Iterator[Batch]:
    images, labels = load()[0]
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(labels), (128,), generator=generator)
        yield images[chosen], labels[chosen]


JOBS = {
    "language": Job(
        _language_model,
        lambda seed: batches(_pairs()[0], LM, seed),
        lambda: list(islice(batches(_pairs()[1], LM, seed=0), 16)),
        steps=200,
    ),
    "digits": Job(_classifier, _digits, lambda: [load()[1]], steps=50),
    "demo": Job(
        lambda: CharLM(Shape()),
        lambda seed: batches(load_corpus().train, Shape(), seed),
        lambda: list(islice(batches(load_corpus().validation, Shape(), seed=0), 8)),
        steps=100,
    ),
    "vision": Job(lambda: network(32), _digits, lambda: [load()[1]], steps=50),
}

Make = Callable[..., StructuredOptimizer]


def _sirf(model: nn.Module, **options: Any) -> StructuredOptimizer:
    return SIRFShampoo(model, beta2=0.1, lam=0.03, **options)


def _rates(language: float, digits: float) -> dict[str, float]:
    """Return the learning rate of each job."""
    return {"language": language, "demo": language, "digits": digits, "vision": digits}


# the learning rates are fixed, and the same with all factors and without some
OPTIMIZERS: dict[str, tuple[Make, dict[str, float]]] = {
    "soap": (SOAP, _rates(language=1.6e-2, digits=3e-3)),
    "klsoap": (KLSOAP, _rates(language=1.6e-2, digits=3e-3)),
    "klshampoo": (KLShampoo, _rates(language=6.4e-2, digits=6.4e-2)),
    "shampoo": (Shampoo, _rates(language=3e-3, digits=3e-3)),
    "sirf": (_sirf, _rates(language=0.1, digits=0.01)),
}


@contextmanager
def limits(name: str) -> Iterator[str]:
    """Set the limits of `"auto"`, given as "thin,long"; yield what `structures=` gets."""
    if name == DENSE:
        yield DENSE
        return
    kept = auto.THIN, auto.LONG
    auto.THIN, auto.LONG = map(int, name.split(","))
    try:
        yield "auto"
    finally:
        auto.THIN, auto.LONG = kept


@dataclass(frozen=True)
class Run:
    """What came out of one training run.

    Attributes:
        train_loss: The mean loss of the last tenth of the training batches, in nats.
        loss: The loss on held-out data at the end, in nats.
        step_seconds: The mean time of a step, forward and backward passes included.
        state: The bytes of the state by those of the parameters.
    """

    train_loss: float
    loss: float
    step_seconds: float
    state: float


def run(job: Job, make: Make, lr: float, name: str, seed: int, steps: int) -> Run:
    """Train once and return what came out."""
    torch.manual_seed(seed)
    model = job.make()
    with limits(name) as structures:
        optimizer = make(model, lr=lr, structures=structures)
    schedule = LambdaLR(optimizer, lambda step: linear_schedule(step, steps))
    train_losses = []
    start = time.perf_counter()
    for inputs, targets in islice(job.batches(seed), steps):
        loss = cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        train_losses.append(loss.item())
    seconds = (time.perf_counter() - start) / steps
    model.eval()
    with torch.no_grad():
        losses = [
            cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).item()
            for inputs, targets in job.held_out()
        ]
    described = describe(optimizer)
    state = described.state_bytes / described.parameter_bytes
    last = train_losses[-max(1, steps // 10) :]
    return Run(statistics.fmean(last), statistics.fmean(losses), seconds, state)


def structures_of(job: Job, make: Make, name: str) -> tuple[tuple[str, ...], ...]:
    """Return the structures of each stack.

    The model is made without memory, so this costs next to nothing.
    """
    with torch.device("meta"):
        model = job.make()
    with limits(name) as structures:
        return tuple(row.structures for row in describe(make(model, structures=structures)).rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Do the runs and print a table per job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--optimizers", nargs="+", default=["soap"], choices=OPTIMIZERS)
    parser.add_argument(
        "--limits", nargs="*", default=LIMITS, help="thin,long, beside dense and the default"
    )
    parser.add_argument("--steps", type=int, help="instead of the usual number")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    for job_name in args.jobs:
        job, rows = JOBS[job_name], []
        for optimizer_name in args.optimizers:
            make, rates = OPTIMIZERS[optimizer_name]
            finished: dict[tuple[tuple[str, ...], ...], list[Run]] = {}
            dense: list[Run] = []
            for name in (DENSE, DEFAULT, *args.limits):
                chosen = structures_of(job, make, name)
                without = sum(s != "dense" for row in chosen for s in row if len(row) > 1)
                if chosen not in finished:
                    finished[chosen] = []
                    for seed in range(1, args.seeds + 1):
                        this = run(job, make, rates[job_name], name, seed, args.steps or job.steps)
                        finished[chosen].append(this)
                        print(f"{job_name} {optimizer_name} {name} {seed}: {this}", file=sys.stderr)
                runs = finished[chosen]
                dense = dense or runs
                losses = [r.loss for r in runs]
                spread = statistics.stdev(losses) if len(losses) > 1 else math.nan
                difference = statistics.fmean(
                    r.loss - d.loss for r, d in zip(runs, dense, strict=True)
                )
                rows.append(
                    (
                        optimizer_name,
                        name + " (default)" * (name == DEFAULT),
                        str(without),
                        f"{statistics.fmean(r.train_loss for r in runs):.4f}",
                        f"{statistics.fmean(losses):.4f} ± {spread:.4f}",
                        f"{difference:+.4f}",
                        f"{runs[0].state:.1f}",
                        f"{1e3 * statistics.median(r.step_seconds for r in runs):.0f}",
                    )
                )
        factors = ("optimizer", "thin,long", "factors left out")
        losses_of = ("training loss", "held-out loss", "minus dense")
        print(f"\n**{job_name}**\n")
        header = (*factors, *losses_of, "state / parameters", "ms per step")
        print(table(header, rows), flush=True)


if __name__ == "__main__":
    main()
