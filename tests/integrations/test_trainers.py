"""Trainers of other packages: training learns, and resumes to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from structprecond import SOAP, Diagnostics, KLShampoo, Muon, SIRFShampoo
from tests.integrations.examples import assert_equal, example
from tests.roles.architectures.table import package

# their own deprecations
pytestmark = pytest.mark.filterwarnings("ignore")

OPTIMIZERS = pytest.mark.parametrize("optimizer", [SOAP, Muon, KLShampoo, SIRFShampoo])


def settings_of(optimizer: Any) -> dict[str, Any]:
    """Return settings with refreshes in every second step, so that some come after the resume."""
    if optimizer is SIRFShampoo:
        return {"T": 2, "batch_size": 16}
    return {} if optimizer is Muon else {"precondition_frequency": 2}


@OPTIMIZERS
def test_hugging_face_resumes_to_the_bit(optimizer: Any, tmp_path: Path) -> None:
    hf = example("hf_trainer", "transformers")
    settings = settings_of(optimizer) | {"save_strategy": "steps", "save_steps": 3}
    whole = hf.make_trainer(str(tmp_path / "whole"), 6, optimizer, **settings)
    whole.train()
    resumed = hf.make_trainer(str(tmp_path / "resumed"), 6, optimizer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.optimizer.optimizer.global_step == 6
    assert_equal(whole.model, resumed.model)


def test_hugging_face_gives_the_model_and_accumulates(tmp_path: Path) -> None:
    hf = example("hf_trainer", "transformers")
    trainer = hf.make_trainer(str(tmp_path), 4, SOAP, gradient_accumulation_steps=2)
    own, seen = trainer.create_optimizer(), []
    Diagnostics(own, every=1, log=lambda _, step: seen.append(step))
    trainer.train()
    assert seen == [0, 1, 2, 3]
    assert own.model is trainer.model
    assert [group["params"] for group in own.param_groups] == [list(trainer.model.parameters())]


def test_hugging_face_in_bf16(tmp_path: Path) -> None:
    hf = example("hf_trainer", "transformers")
    trainer = hf.make_trainer(str(tmp_path), 20, Muon, bf16=True)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < float(losses[0])


@OPTIMIZERS
def test_accelerate_resumes_to_the_bit(optimizer: Any, tmp_path: Path) -> None:
    loop = example("accelerate_loop", "accelerate")
    settings = settings_of(optimizer)
    accelerator, model, own = loop.make(optimizer, **settings)
    loop.train(accelerator, model, own, loop.batches(6))
    accelerator.save_state(str(tmp_path))
    loop.train(accelerator, model, own, loop.batches(12, first=6))
    accelerator, again, own = loop.make(optimizer, **settings)
    accelerator.load_state(str(tmp_path))
    assert own.optimizer.global_step == 3
    loop.train(accelerator, again, own, loop.batches(12, first=6))
    assert_equal(model, again)


@OPTIMIZERS
def test_lightning_resumes_to_the_bit(optimizer: Any, tmp_path: Path) -> None:
    own = example("lightning_module", "lightning")
    settings = settings_of(optimizer)

    class Save(package("lightning").Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def fit(checkpoint: Path | None = None) -> tuple[Any, Any]:
        module = own.Regression(optimizer, 6, **settings)
        trainer = own.make_trainer(6, str(tmp_path))
        trainer.callbacks.append(Save())
        trainer.fit(module, own.loader(96), ckpt_path=checkpoint)  # three batches an epoch
        return trainer, module

    _, whole = fit()
    trainer, resumed = fit(tmp_path / "half.ckpt")
    assert trainer.optimizers[0].global_step == 6
    assert resumed.losses == whole.losses[3:]
    assert_equal(whole, resumed)


@pytest.mark.parametrize(
    ("name", "needs", "argv"),
    [
        ("hf_trainer", "transformers", ["--steps", "20"]),
        ("accelerate_loop", "accelerate", ["--steps", "40"]),
        ("lightning_module", "lightning", ["--steps", "30"]),
        ("lightning_module", "lightning", ["--steps", "30", "--sam"]),
    ],
)
def test_examples_learn(name: str, needs: str, argv: list[str]) -> None:
    losses = example(name, needs).main(argv)
    assert losses[-1] < 0.8 * losses[0]
