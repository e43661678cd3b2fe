"""A small character-level language model: the training job that the examples share.

The model is a decoder-only transformer. The data is the source text of the running Python's
standard library, so nothing is downloaded. Weights, batches and schedule depend only on the seed:
with the same seed, two optimizers start from the same weights and see the same batches.
"""

from __future__ import annotations

import math
import statistics
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

# One token for newline and for each printable ASCII character; the last token is "unknown".
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = len(ALPHABET) + 1

# Installed packages, tests, tables and GUI programs are not part of the text.
LEFT_OUT = frozenset(
    "site-packages dist-packages test tests encodings pydoc_data distutils lib2to3 ensurepip "
    "idlelib tkinter turtledemo".split()
)


@dataclass(frozen=True)
class Shape:
    """The sizes of the model and of a batch."""

    layers: int = 3
    width: int = 128
    heads: int = 4
    context: int = 128
    batch: int = 24


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.o = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, context, width), in and out
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(-2))
        return out


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:  # (batch, context, width), in and out
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class CharLM(nn.Module):
    """A decoder-only transformer over characters, initialised as PyTorch does by default."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.Sequential(*(Block(shape.width, shape.heads) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, context) -> (batch, context, vocabulary)
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def encode(text: bytes) -> Tensor:  # (characters,), uint8
    """Turn source text into tokens."""
    token_of = bytearray([VOCABULARY - 1] * 256)
    for token, character in enumerate(ALPHABET):
        token_of[ord(character)] = token
    return torch.frombuffer(bytearray(text.translate(token_of)), dtype=torch.uint8)


@dataclass(frozen=True)
class Corpus:
    """Text as tokens."""

    train: Tensor  # (characters,)
    validation: Tensor  # (characters,)


def load_corpus(limit: int = 8_000_000) -> Corpus:
    """Read the source text of the standard library.

    Args:
        limit: The largest number of characters to use, training and validation together.

    Returns:
        The tokens. A hash of a file's name decides its order and its split: a tenth of the files
        is for validation.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    hashed = sorted((zlib.crc32(name.as_posix().encode()), name) for name in names)
    train, validation = bytearray(), bytearray()
    for digest, name in hashed:
        if LEFT_OUT.isdisjoint(name.parts):
            room = limit - len(train) - len(validation)
            text = (root / name).read_bytes()[:room]
            (validation if digest % 10 == 0 else train).extend(text)
    return Corpus(encode(bytes(train)), encode(bytes(validation)))


def batches(
    tokens: Tensor,  # (characters,)
    shape: Shape,
    seed: int,
) -> Iterator[tuple[Tensor, Tensor]]:  # inputs and targets, each (batch, context)
    """Draw random windows of the text endlessly; equal seeds draw equal windows."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(shape.context + 1)
    while True:
        starts = torch.randint(len(tokens) - shape.context, (shape.batch, 1), generator=generator)
        drawn = tokens[starts + window].long()
        yield drawn[:, :-1], drawn[:, 1:]


def loss_on(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean cross-entropy, in nats per character."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, held_out: list[tuple[Tensor, Tensor]]) -> float:
    """Compute the mean loss over batches and leave the model in training mode."""
    model.eval()
    loss = statistics.fmean(loss_on(model, *batch).item() for batch in held_out)
    model.train()
    return loss


@dataclass
class Run:
    """The settings and the results of a training run.

    Attributes:
        name: The optimizer's name.
        lr: The peak learning rate.
        seed: The seed of the weights and of the batches.
        steps: The length of the schedule.
        curve: (step, training seconds so far, validation loss); evaluations are not timed.
        step_seconds: The time of a training step: the median over stretches of 20 steps of their
            mean. It includes rare expensive steps, but not busy moments of the machine.
        diverged: Whether a non-finite loss ended the run early.
    """

    name: str
    lr: float
    seed: int
    steps: int
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    step_seconds: float = math.nan
    diverged: bool = False

    @property
    def final_loss(self) -> float:
        """The last validation loss, infinite for a run that diverged."""
        return math.inf if self.diverged else self.curve[-1][2]

    def time_to(self, loss: float) -> tuple[float, float] | None:
        """Return the step and the seconds at which the validation loss reached `loss`.

        Interpolates linearly between evaluations. None if the loss was never reached.
        """
        for before, after in pairwise(self.curve):
            if after[2] <= loss < before[2]:
                part = (before[2] - loss) / (before[2] - after[2])
                step = before[0] + part * (after[0] - before[0])
                return step, before[1] + part * (after[1] - before[1])
        return None


def linear_schedule(step: int, steps: int) -> float:
    """Warm up linearly over a tenth of the steps, then decay linearly to 0 at `steps`."""
    warm_up = max(1, steps // 10)
    return min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))


def train(
    run: Run,
    make_optimizer: Callable[[nn.Module, float], Optimizer],
    shape: Shape,
    corpus: Corpus,
    *,
    eval_every: int = 20,
    eval_batches: int = 8,
    quiet: bool | None = False,
) -> Run:
    """Train a new model.

    Args:
        run: The settings, and the record to fill in.
        make_optimizer: Makes the optimizer from the model and the peak learning rate.
        shape: The sizes of the model and of a batch.
        corpus: The text.
        eval_every: The number of steps between two evaluations.
        eval_batches: The number of validation batches, the same in every evaluation.
        quiet: Whether to hide the progress bar. None hides it without a terminal.

    Returns:
        The record.
    """
    torch.manual_seed(run.seed)
    model = CharLM(shape)
    optimizer = make_optimizer(model, run.lr)
    schedule = LambdaLR(optimizer, lambda step: linear_schedule(step, run.steps))
    held_out = list(islice(batches(corpus.validation, shape, seed=0), eval_batches))
    run.curve.append((0, 0.0, evaluate(model, held_out)))
    seconds: list[float] = []
    drawn = islice(batches(corpus.train, shape, run.seed), run.steps)
    bar = tqdm(drawn, desc=run.name, total=run.steps, unit="step", disable=quiet)
    for step, batch in enumerate(bar, start=1):
        start = time.perf_counter()
        loss = loss_on(model, *batch)
        if not math.isfinite(value := loss.item()):
            run.diverged = True
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seconds.append(time.perf_counter() - start)
        if step % eval_every == 0 or step == run.steps:
            run.curve.append((step, sum(seconds), evaluate(model, held_out)))
        bar.set_postfix(loss=f"{value:.3f}", validation=f"{run.curve[-1][2]:.3f}", refresh=False)
    run.diverged |= not math.isfinite(run.curve[-1][2])
    stretches = [statistics.fmean(seconds[i : i + 20]) for i in range(0, len(seconds), 20)]
    run.step_seconds = statistics.median(stretches) if stretches else math.nan
    return run
