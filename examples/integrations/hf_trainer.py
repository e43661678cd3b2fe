"""Hugging Face Trainer with an optimizer of this library, on a random tiny GPT-2.

    python examples/integrations/hf_trainer.py

Trainer passes parameters in two groups to an optimizer's class, with and without weight decay. Give
it the model instead, as "model" among the keywords: the library then finds roles and decay itself.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from structprecond import Muon


class Squares(Dataset[dict[str, torch.Tensor]]):
    """Sequences in which each token is the square of the one before."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = [index % 29 + 2]
        for _ in range(15):
            tokens.append(tokens[-1] ** 2 % 31)
        return {"input_ids": torch.tensor(tokens), "labels": torch.tensor(tokens)}


def make_model() -> Any:
    """Return a random GPT-2 with two layers."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": 31}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def make_trainer(folder: str, steps: int, optimizer: Any = Muon, **settings: Any) -> Any:
    """Return a trainer; `settings` are those of the optimizer, or of `TrainingArguments`."""
    model = make_model()
    known = TrainingArguments.__dataclass_fields__
    more = {name: settings.pop(name) for name in list(settings) if name in known}
    usual = {"per_device_train_batch_size": 16, "logging_steps": 5, "save_strategy": "no"}
    arguments = TrainingArguments(
        folder, max_steps=steps, use_cpu=True, report_to="none", **usual | more
    )
    return Trainer(
        model,
        arguments,
        train_dataset=Squares(),
        optimizer_cls_and_kwargs=(optimizer, {"model": model, "lr": 0.01, **settings}),
    )


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, and return the logged losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, args.steps)
        trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
