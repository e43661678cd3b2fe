"""The language model demo, on a tiny model."""

import math

import char_lm
import demo
import pytest
import torch
import training
from char_lm import CharTask, Shape
from optimizers import OPTIMIZERS
from training import Run

TINY = Shape(layers=1, width=16, heads=2, context=16, batch=4)
TINY_ARGS = "--layers 1 --width 16 --heads 2 --context 16 --batch 4 --steps 6 --threads 1".split()
NAMES = ["adamw", "sirf"]


@pytest.fixture(scope="module")
def corpus():
    return char_lm.load_corpus(limit=300_000)


@pytest.fixture(autouse=True)
def small_corpus(monkeypatch, corpus):
    monkeypatch.setattr(demo, "load_corpus", lambda: corpus)


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def rows_of(table):
    """Read the cells of a Markdown table, by the first cell of each row."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in rows}) == 1
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


class TestJob:
    def test_corpus_is_source_text_up_to_the_limit(self, corpus):
        sizes = len(corpus.train), len(corpus.validation)
        assert sum(sizes) == 300_000
        assert 0.01 < sizes[1] / sizes[0] < 0.5
        assert corpus.train.max() < char_lm.VOCABULARY
        text = "".join(char_lm.ALPHABET[token] for token in corpus.train.clamp(max=95).tolist())
        assert text.count("\n    def ") > 100

    def test_encoding_knows_printable_characters_and_one_unknown(self):
        unknown = len(char_lm.ALPHABET)
        assert char_lm.encode(b"\n ~\t\xff").tolist() == [0, 1, 95, unknown, unknown]

    def test_targets_are_the_next_characters_and_depend_on_the_seed(self, corpus):
        inputs, targets = next(char_lm.batches(corpus.train, TINY, seed=1))
        assert inputs.shape == targets.shape == (TINY.batch, TINY.context)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert torch.equal(next(char_lm.batches(corpus.train, TINY, seed=1))[0], inputs)
        assert not torch.equal(next(char_lm.batches(corpus.train, TINY, seed=2))[0], inputs)

    def test_model_does_not_look_ahead(self):
        model = char_lm.CharLM(TINY)
        tokens = torch.randint(char_lm.VOCABULARY, (1, TINY.context))
        changed = tokens.clone()
        changed[0, -1] = (changed[0, -1] + 1) % char_lm.VOCABULARY
        before, after = model(tokens), model(changed)
        torch.testing.assert_close(before[:, :-1], after[:, :-1])
        assert not torch.allclose(before[:, -1], after[:, -1])

    @pytest.mark.parametrize("steps", [1, 6, 400])
    def test_schedule_warms_up_to_one_and_decays_to_zero(self, steps):
        factors = [training.linear_schedule(step, steps) for step in range(steps + 1)]
        peak = factors.index(max(factors))
        assert max(factors) == 1
        assert peak == max(1, steps // 10) - 1
        assert all(f > 0 for f in factors[:-1])
        assert factors[-1] == 0

    @pytest.mark.parametrize("name", NAMES)
    def test_same_seed_gives_the_same_losses(self, corpus, name):
        make = OPTIMIZERS[name].make

        def losses(seed):
            task = CharTask(TINY, corpus)
            run = training.train(Run(name, 1e-2, seed, 6), make, task, eval_every=2, quiet=True)
            assert [step for step, _, _ in run.curve] == [0, 2, 4, 6]
            return [loss for _, _, loss in run.curve]

        assert losses(0) == losses(0)
        assert losses(0) != losses(1)

    def test_divergence_ends_the_run(self, corpus):
        run = training.train(
            Run("sgd", 1e30, 0, 50),
            lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr),
            CharTask(TINY, corpus),
            eval_every=1000,
            quiet=True,
        )
        assert run.diverged
        assert run.final_loss == math.inf
        assert [step for step, _, _ in run.curve] == [0]

    def test_time_to_a_loss_is_between_evaluations(self):
        run = Run("any", 1.0, 0, 20, [(0, 0.0, 5.0), (10, 1.0, 4.0), (20, 3.0, 2.0)])
        assert run.time_to(4.0) == (10, 1.0)
        assert run.time_to(3.0) == (15, 2.0)
        assert run.time_to(1.9) is None
        assert run.time_to(math.inf) is None


class TestDemo:
    def test_trains_all_and_shows_them(self, tmp_path, capsys):
        picture = tmp_path / "curves.png"
        runs = demo.main([*TINY_ARGS, "--out", str(picture), "--optimizers", *NAMES])
        assert [run.name for run in runs] == NAMES
        for run in runs:
            assert not run.diverged
            assert math.isfinite(run.final_loss)
            assert run.final_loss < run.curve[0][2]
            assert run.curve[-1][0] == 6
        # same weights and same validation batches before the first step
        assert runs[0].curve[0] == runs[1].curve[0]
        assert is_png(picture)
        rows = rows_of(capsys.readouterr().out)
        assert list(rows) == NAMES
        for run in runs:
            assert rows[run.name]["lr"] == f"{OPTIMIZERS[run.name].lr:g}"
            assert float(rows[run.name]["validation loss"]) == pytest.approx(
                run.final_loss, abs=1e-4
            )
        assert rows["adamw"]["steps to adamw's loss"] == "6"

    def test_summary_says_who_diverged_or_never_got_there(self):
        curve = [(0, 0.0, 5.0), (10, 2.0, 3.0)]
        first = Run("first", 1.0, 0, 10, curve, 0.2)
        slow = Run("slow", 1.0, 0, 10, [(0, 0.0, 5.0), (10, 4.0, 3.5)], 0.4)
        broken = Run("broken", 1.0, 0, 10, curve[:1], 0.4, diverged=True)
        rows = rows_of(demo.summary([first, slow, broken]))
        assert rows["slow"]["steps to first's loss"] == "-"
        assert rows["slow"]["ms per step"] == "400"
        assert rows["broken"]["validation loss"] == "diverged"
