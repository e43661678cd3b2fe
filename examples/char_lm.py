"""A small character-level language model: the training job that the examples share.

The model is a decoder-only transformer. The data is the source text of the running Python's
standard library, so nothing is downloaded. Weights, batches and schedule depend only on the seed:
with the same seed, two optimizers start from the same weights and see the same batches.
"""

from __future__ import annotations

import statistics
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import Task

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


class CharTask(Task):
    """Training of a `CharLM`; the loss is in nats per character.

    Args:
        shape: The sizes of the model and of a batch.
        corpus: The text.
        eval_batches: The number of validation batches, the same in every evaluation.
    """

    def __init__(self, shape: Shape, corpus: Corpus, eval_batches: int = 8) -> None:
        self.shape, self.corpus = shape, corpus
        self._held_out = list(islice(batches(corpus.validation, shape, seed=0), eval_batches))

    def model(self) -> nn.Module:
        return CharLM(self.shape)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(self.corpus.train, self.shape, seed)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss_on(model, *batch)

    def evaluate(self, model: nn.Module) -> float:
        return evaluate(model, self._held_out)
