"""The GPU benchmark in short form, on the CPU."""

import json

import gpu
import pytest
import torch

from structprecond import SOAP
from structprecond.testing.table import STRATEGIES


@pytest.fixture
def out(tmp_path):
    return tmp_path / "gpu.jsonl"


def run(part, out, *more):
    left = gpu.main(["--device", "cpu", "--short", "--part", part, "--out", str(out), *more])
    return left, gpu.read(out)


def test_parity_is_exact_between_equal_devices(out):
    left, records = run("parity", out)
    assert left == 0
    assert len(records) == 6
    assert {r["piece"]["dtype"] for r in records} == {"float32", "float64"}
    assert [r["result"] for r in records] == [0.0] * 6


def test_parity_finds_a_device_that_computes_something_else(out, monkeypatch):
    steps = iter(range(10**6))

    def make(model, **overrides):
        made = SOAP(model, lr=0.01)
        if next(steps) % 2:  # the second model of each pair
            made.param_groups[0]["lr"] = 0.011
        return made

    name = next(name for name, usage in STRATEGIES.items() if usage.protocol)
    monkeypatch.setattr(type(STRATEGIES[name]), "make", lambda self, model: make(model))
    _, records = run("parity", out)
    assert min(r["result"] for r in records) > 1e-4


def test_steps_are_timed_for_all_contestants(out):
    left, records = run("steps", out)
    assert left == 0
    assert [r["piece"]["race"] for r in records] == ["adamw", "muon, float32"]
    names = [one["name"] for one in records[0]["result"]]
    assert names == ["structprecond", "torch, foreach", "torch, fused"]
    for record in records:
        for one in record["result"]:
            assert 0 < one["mean"] <= one["worst"]
            assert one["syncs"] is None  # the CPU waits for nothing


def test_captured_steps_equal_plain_ones(out):
    left, records = run("captured", out)
    assert left == 0
    assert [r["piece"]["optimizer"] for r in records] == ["SOAP", "Muon", "AdamW"]
    for record in records:
        assert record["result"]["difference"] == 0
        assert min(record["result"][key] for key in ("plain", "captured")) > 0


def test_the_share_is_that_of_the_optimizer(out):
    _, records = run("share", out)
    for record in records:
        passes, own = record["result"]["passes"], record["result"]["optimizer"]
        assert record["result"]["share"] == pytest.approx(own / (own + passes))


def test_what_is_done_is_not_done_again_and_what_failed_is(out, capsys):
    _, records = run("parity", out)
    failed = {key: value for key, value in records[0].items() if key != "result"}
    lines = [json.dumps(failed | {"error": "RuntimeError: no"}), *map(json.dumps, records[1:])]
    out.write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    _, records = run("parity", out)
    assert capsys.readouterr().out.count("parity: ") == 1
    assert len(records) == 7


def test_a_line_that_was_cut_off_does_not_count(out):
    out.write_text('{"part": "parity"}\n{"part": "par')
    assert gpu.read(out) == [{"part": "parity"}]


def test_the_time_limit_leaves_pieces_and_says_so(out, capsys):
    left, records = run("parity", out, "--minutes", "-1")
    assert (left, records) == (6, [])
    assert "6 pieces are left" in capsys.readouterr().out


def test_the_page_says_what_was_not_run(out):
    _, records = run("parity", out)
    text = gpu.report(records)  # those of the CPU do not count
    assert text.count("Not yet run on a GPU.") == len(gpu.PARTS)
    usual = {"short": False, "device": "Card", "part": "parity"}
    text = gpu.report([records[0] | usual | {"result": 3e-7}])
    assert text.count("Not yet run on a GPU.") == len(gpu.PARTS) - 1
    assert "| Card |" in text
    assert "3.0e-07" in text


def test_the_page_in_the_repository_is_that_of_the_records():
    page = (gpu.ROOT / "docs" / "gpu.md").read_text()
    assert page == gpu.report(gpu.read(gpu.OUT))


def test_without_a_gpu_it_says_what_to_do(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--device cpu --short" in capsys.readouterr().err
