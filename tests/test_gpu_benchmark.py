"""The GPU benchmark in short form, on the CPU."""

import json
import sys
import textwrap
from types import SimpleNamespace
from typing import Any

import contestants
import gpu
import pytest
import roofline
import torch
from contestants import PEERS
from torch import nn
from workloads import fill_gradients

from structprecond import SOAP, AdamW
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
    found = {r["piece"]["race"]: r["result"] for r in records}
    assert found.keys() == {"adamw", "muon, float32"}
    names = [one["name"] for one in found["adamw"]]
    assert names == ["structprecond", "torch, foreach", "torch, fused"]
    for record in records:
        for one in record["result"]:
            assert 0 < one["mean"] <= one["worst"]
            assert one["syncs"] is None  # the CPU waits for nothing


# the constructors of the packages, around torch's SGD
STAND_INS = {
    "distributed-shampoo": (
        "distributed_shampoo/__init__.py",
        """
        class AdamPreconditionerConfig:
            def __init__(self, *, beta2=0.999, epsilon=1e-10): ...
        class SingleDeviceDistributedConfig:
            def __init__(self, *, target_parameter_dimensionality=1):
                self.axes = target_parameter_dimensionality
        DefaultSOAPConfig = DefaultShampooConfig = object()
        class DistributedShampoo(SGD):
            def __init__(
                self, params, lr=1e-2, betas=(0.9, 1.0), beta3=-1.0, epsilon=1e-12,
                weight_decay=0.0, weight_decay_type=None, max_preconditioner_dim=1024,
                precondition_frequency=1, start_preconditioning_step=-1,
                use_bias_correction=True, iterate_averaging_config=None, grafting_config=None,
                use_pin_memory=False, shampoo_pt2_compile_config=None, distributed_config=None,
                preconditioner_config=DefaultShampooConfig,
            ):
                assert precondition_frequency == 10 and distributed_config.axes >= 4
                super().__init__(params, lr)
        """,
    ),
    "emerging-optimizers": (
        "emerging_optimizers/orthogonalized_optimizers/__init__.py",
        """
        class Muon(SGD):
            def __init__(
                self, params, lr=3e-4, momentum=0.95, weight_decay=0.01, *, nesterov=False,
                weight_decay_method="decoupled", fp32_matmul_prec="medium",
                coefficient_type="quintic", num_ns_steps=5, scale_mode="spectral",
                extra_scale_factor=1.0, use_syrk=False, weight_update_hook=None,
            ):
                assert fp32_matmul_prec in ("highest", "medium") and not use_syrk
                super().__init__(params, lr)
        """,
    ),
    "dion": (
        "dion/__init__.py",
        """
        class Muon(SGD):
            def __init__(
                self, params, distributed_mesh=None, lr=0.01, mu=0.95, betas=(0.9, 0.95),
                weight_decay=0.01, cautious_wd=False, epsilon=1e-8, nesterov=False,
                adjust_lr="spectral_norm", flatten=False, use_gram_newton_schulz=False,
                use_triton=False, use_polar_express=True, newton_schulz_func=None,
            ):
                assert [g.get("algorithm", "muon") for g in params] == ["muon", "adamw"]
                assert mu == 0.95 and not use_triton
                matrices = params[0]["params"]
                super().__init__([p for g in params for p in g["params"]], lr, matrices)
        """,
    ),
    "dash": (
        "ista_daslab_optimizers/dash/__init__.py",
        """
        import enum
        from dataclasses import dataclass
        DashInverseRootMethodType = enum.Enum("DashInverseRootMethodType", "EVD CN CBSHV NDB")
        DashMatrixScalingType = enum.Enum("DashMatrixScalingType", "POWER_ITER POWER_ITER_MULTI")
        @dataclass
        class DashConfig:
            beta_G: float = 0.9
            beta_LR: float = 0.95
            beta_graft: float = 0.95
            inv_root_method: object = None
            inv_root_freq: int = 10
            block_size: int = 1024
            matrix_scaling_type: object = None
        class DashGpu(SGD):
            def __init__(self, param_groups, lr, weight_decay, config):
                for p in param_groups:
                    assert not all(n % config.block_size for n in p.shape), config.block_size
                super().__init__(param_groups, lr)
        """,
    ),
}
BASE = """
import torch
class SGD(torch.optim.SGD):
    def __init__(self, params, lr, matrices=None):
        params = list(params)
        assert all(p.ndim >= 2 for p in matrices or params)
        super().__init__(params, lr)
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Make the checkout of a package with the constructors of the real one."""
    known = set(sys.modules)

    def make(name, more=""):
        path, source = STAND_INS[name]
        file = tmp_path / "checkout" / path
        file.parent.mkdir(parents=True)
        (tmp_path / "checkout" / path.partition("/")[0] / "__init__.py").touch()
        file.write_text(BASE + textwrap.dedent(source) + more)
        return tmp_path / "checkout"

    yield make
    for name in set(sys.modules) - known:
        if name.partition(".")[0] in {peer.module.partition(".")[0] for peer in PEERS.values()}:
            del sys.modules[name]


@pytest.mark.parametrize("name", PEERS)
def test_packages_from_checkouts_race(name, out, checkout, capsys):
    left, records = run("steps", out, "--peer-path", f"{name}={checkout(name)}")
    assert left == 0
    found = {r["piece"]["race"]: [one["name"] for one in r["result"]] for r in records}
    raced = {race for race, names in found.items() if name in names}
    assert raced == set(PEERS[name].builds), capsys.readouterr().err
    with_peers = {r["piece"]["race"] for r in records if r["piece"].get("peers") == [name]}
    assert with_peers == raced


@pytest.mark.parametrize("name", PEERS)
def test_packages_from_checkouts_step_all_parameters(name, checkout):
    races = contestants.with_peers([f"{name}={checkout(name)}"])
    for race in PEERS[name].builds:
        model = nn.ModuleList([nn.Embedding(8, 4), nn.Linear(4, 16), nn.Linear(16, 4)])
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = races[race][name](model)
        fill_gradients(model, 0)
        optimizer.step()
        assert all(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("dion", ["'dion'", "expected NAME=DIR", "distributed-shampoo"]),
        ("sophia=.", ["'sophia=.'", "emerging-optimizers", "as in --peer-path dion=../dion"]),
        ("dion=nowhere", ["'dion=nowhere'", "no package dion", "microsoft/dion", "Clone"]),
    ],
)
def test_a_wrong_peer_path_says_what_to_do(given, words, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--short", "--peer-path", given])
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_a_checkout_that_cannot_be_imported_says_why(checkout, capsys):
    folder = checkout("dion", "import no_such_package")
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--short", "--peer-path", f"dion={folder}"])
    message = capsys.readouterr().err
    assert "No module named 'no_such_package'" in message
    assert "Install what it requires" in message
    assert str(folder) not in sys.path


def test_the_floor_follows_from_products_and_bytes():
    model = nn.ModuleList([nn.Linear(4, 4, bias=False)])
    muon = roofline.estimated_floor(model, contestants.RACES["muon, float32"][contestants.OURS])
    # five iterations of three products; momentum, gradient and parameters, and 42 bytes of counters
    assert muon.operations == 5 * 3 * 2 * 4**3
    assert muon.bytes == 4 * 5 * 16 + 2 * 42
    rates: Any = SimpleNamespace(speed=1920e3, bandwidth=muon.bytes * 1e3)
    assert muon.milliseconds(rates) == pytest.approx(1 + 1)
    adamw = roofline.estimated_floor(model.bfloat16(), AdamW)
    assert adamw.operations == 0
    # gradients and parameters in two bytes, two moments in four
    assert adamw.bytes == (3 * 2 + 2 * 2 * 4) * 16 + 2 * 42


def test_rates_count_operations_and_bytes_of_what_was_timed(monkeypatch):
    monkeypatch.setattr(roofline.Rates, "_time", lambda self, call: 2.0)
    rates = roofline.Rates()
    assert rates.speed == pytest.approx(1024**3 / 1e-3)
    assert rates.bandwidth == pytest.approx(4 * 2**24 / 1e-3)


def test_steps_take_longer_than_their_floor(out):
    left, records = run("floor", out)
    assert left == 0
    assert records[0]["piece"] == {"rates": "float32"}
    assert min(records[0]["result"].values()) > 0
    assert [r["piece"]["race"] for r in records[1:]] == ["adamw", "muon, float32"]
    for record in records[1:]:
        bound, measured, ratio = record["result"].values()
        assert 0 < bound < measured
        assert ratio == pytest.approx(measured / bound)


def test_the_page_compares_floors_with_the_goals():
    usual = {"part": "floor", "short": False, "device": "Card", "torch": "2"}
    piece = {"race": "soap", "precision": "tf32"}
    records = [
        {**usual, "piece": {"workload": workload, **piece}, "result": {"step / floor": 1.7}}
        for workload in ("W3", "W5", "W6")
    ]
    text = gpu.report(records)
    assert "| W3, soap, tf32 | step / floor 1.7 |" in text
    assert "step / floor 1.7 (goal: at most 2, met) |" in text
    assert "step / floor 1.7 (goal: at most 1.5, missed) |" in text


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
