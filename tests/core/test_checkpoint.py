"""A checkpoint is tensors and plain values, restores training to the bit, or changes nothing."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

from structprecond import (
    CheckpointError,
    Hyperparameter,
    LinearWeightBias,
    PerParameter,
    SIRFShampoo,
    SIRFShampooStrategy,
    SplitHeads,
    State,
    StepContext,
    Strategy,
    StructuredOptimizer,
)
from tests.helpers import (
    SETTINGS,
    assert_close,
    backward,
    mlp,
    same_bits,
    set_grads,
    snapshot,
    train,
    values,
)

STRUCTURES: dict[str, Any] = {
    name: name
    for name in (
        "dense",
        "diagonal",
        "block3diagonal",
        "hierarchical2_1",
        "triltoeplitz",
        "triutoeplitz",
        "triltopleftdiag",
        "trilbottomrightdiag",
        "triutopleftdiag",
        "triubottomrightdiag",
        "none",
    )
} | {"mixed": {1: "diagonal", 2: ("block3diagonal", "none"), 4: "dense"}}


def _through_a_file(value: Any) -> Any:
    """Save, and load as torch does by default: without trust in the file."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


def _sirf(model: nn.Module, params: Any = None, **kwargs: Any) -> SIRFShampoo:
    return SIRFShampoo(model, params, **SETTINGS | kwargs)


def _continue(
    model: nn.Module, optimizer: StructuredOptimizer, steps: int, start: int
) -> list[Any]:
    """Train on, and return everything after every step."""
    snapshots = []
    for step in range(start, start + steps):
        train(model, optimizer, 1, start=step)
        snapshots.append(snapshot(model, optimizer))
    return snapshots


# --- restoring -----------------------------------------------------------------------------------


@pytest.mark.parametrize("structures", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_training_resumes_to_the_bit(structures: Any) -> None:
    model = mlp()
    optimizer = _sirf(model, structures=structures, T=2)
    train(model, optimizer, 5)
    weights, saved = copy.deepcopy(model.state_dict()), _through_a_file(optimizer.state_dict())
    expected = _continue(model, optimizer, 20, start=5)

    fresh_model = mlp()  # other values: nothing may depend on them
    fresh = _sirf(fresh_model, structures=structures, T=2)
    fresh_model.load_state_dict(weights)
    fresh.load_state_dict(saved)
    actual = _continue(fresh_model, fresh, 20, start=5)
    for a, e in zip(actual, expected, strict=True):
        for key in ("params", "shown", "stacks", "counters"):
            assert same_bits(a[key], e[key]), key


@pytest.mark.parametrize("rule", [LinearWeightBias(), SplitHeads("*.weight", heads=2)])
def test_training_with_joint_and_split_parameters_resumes_to_the_bit(rule: Any) -> None:
    kwargs: dict[str, Any] = {"combine_params": (rule, PerParameter()), "structures": "dense"}
    model = mlp()
    optimizer = _sirf(model, **kwargs)
    train(model, optimizer, 5)
    weights, saved = copy.deepcopy(model.state_dict()), _through_a_file(optimizer.state_dict())
    expected = _continue(model, optimizer, 20, start=5)
    fresh_model = mlp()
    fresh = _sirf(fresh_model, **kwargs)
    fresh_model.load_state_dict(weights)
    fresh.load_state_dict(saved)
    actual = _continue(fresh_model, fresh, 20, start=5)
    assert same_bits([a["params"] for a in actual], [e["params"] for e in expected])


def test_schedulers_groups_and_step_counts_of_single_units_resume_to_the_bit(
    tmp_path: Path,
) -> None:
    def build() -> tuple[Any, SIRFShampoo, LambdaLR]:
        model = mlp()
        groups = [{"params": model[4:].parameters()}, {"params": model[:4].parameters(), "lr": 0.2}]
        optimizer = _sirf(model, groups, T=lambda step: step % 3 == 0)
        return model, optimizer, LambdaLR(optimizer, [lambda e: 0.9**e, lambda e: 1 / (1 + e)])

    def go(model: Any, optimizer: SIRFShampoo, scheduler: LambdaLR, steps: range) -> list[Tensor]:
        for step in steps:
            optimizer.zero_grad()
            backward(model, step)
            if step < 7:
                model[2].weight.grad = None  # late, and overdue for a refresh
            optimizer.step()
            scheduler.step()
        return values(model)

    model, optimizer, scheduler = build()
    go(model, optimizer, scheduler, range(5))
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    torch.save({key: part.state_dict() for key, part in parts.items()}, tmp_path / "checkpoint.pt")
    expected = go(model, optimizer, scheduler, range(5, 15))
    model, optimizer, scheduler = build()
    saved = torch.load(tmp_path / "checkpoint.pt")
    for key, part in {"model": model, "optimizer": optimizer, "scheduler": scheduler}.items():
        part.load_state_dict(saved[key])
    assert optimizer.param_groups[1]["lr"] == 0.2 / 6
    assert same_bits(go(model, optimizer, scheduler, range(5, 15)), expected)


@pytest.mark.parametrize("copier", ["checkpoint", "deepcopy", "pickle"])
def test_staggered_refreshes_resume_to_the_bit(copier: str) -> None:
    def build(model: nn.Module) -> StructuredOptimizer:
        return StructuredOptimizer(
            model,
            strategy=SIRFShampooStrategy(),
            hyperparameters={**SETTINGS, "T": 3},
            refresh="staggered",
            batch_size=6,
        )

    model = mlp()
    optimizer = build(model)
    for step in range(4):
        set_grads(list(model.parameters()), step)
        optimizer.step()
    if copier == "checkpoint":
        other: Any = copy.deepcopy(model)
        fresh: Any = build(other)
        fresh.load_state_dict(_through_a_file(optimizer.state_dict()))
    else:
        pair = (model, optimizer)
        other, fresh = copy.deepcopy(pair) if copier == "deepcopy" else _pickled(pair)
    for step in range(4, 12):
        for m, o in ((model, optimizer), (other, fresh)):
            set_grads(list(m.parameters()), step)
            o.step()
        assert same_bits(values(other), values(model))


def _pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.filterwarnings("ignore:The gradients of")
def test_skipped_steps_are_remembered() -> None:
    model = mlp()
    optimizer = _sirf(model, batch_size=6)
    set_grads(list(model.parameters()), 0)
    model[0].bias.grad[0] = torch.nan
    optimizer.step()
    fresh = _sirf(mlp(), batch_size=6)
    fresh.load_state_dict(_through_a_file(optimizer.state_dict()))
    assert fresh.skipped == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_of_low_precision_parameters_stays_float32(dtype: torch.dtype) -> None:
    model = mlp(dtype)
    optimizer = _sirf(model, batch_size=6)
    for step in range(4):
        set_grads(list(model.parameters()), step)
        optimizer.step()
    saved = _through_a_file(optimizer.state_dict())
    floating = {
        t.dtype
        for entry in saved["state"].values()
        for t in entry.values()
        if t.is_floating_point()
    }
    assert floating == {torch.float32}
    fresh_model = copy.deepcopy(model)
    fresh = _sirf(fresh_model, batch_size=6)
    fresh.load_state_dict(saved)
    # bits that the dtype of the parameters cannot hold came through
    buffer = fresh.state[fresh_model[0].weight]["momentum_buffer"]
    assert not torch.equal(buffer, buffer.to(dtype).float())
    for step in range(4, 10):
        for m, o in ((model, optimizer), (fresh_model, fresh)):
            set_grads(list(m.parameters()), step)
            o.step()
    assert same_bits(snapshot(fresh_model, fresh)["stacks"], snapshot(model, optimizer)["stacks"])
    assert same_bits(values(fresh_model), values(model))


def test_state_is_loaded_into_the_dtypes_of_the_optimizer() -> None:
    model = mlp()
    optimizer = _sirf(model)
    train(model, optimizer, 3)
    fresh_model = mlp()
    fresh = _sirf(fresh_model, preconditioner_dtypes=torch.float32)
    fresh.load_state_dict(optimizer.state_dict())
    entry = fresh.state[fresh_model[0].weight]
    original = optimizer.state[model[0].weight]
    assert entry["preconditioner.0.mat"].dtype == torch.float32
    assert_close(entry["preconditioner.0.mat"].double(), original["preconditioner.0.mat"], 1e-7)
    assert fresh.param_groups[0]["preconditioner_dtypes"] is torch.float32
    optimizer.load_state_dict(fresh.state_dict())
    assert optimizer.param_groups[0]["preconditioner_dtypes"] is None


def test_parameters_are_matched_by_name_when_they_are_registered_in_another_order() -> None:
    class Net(nn.Module):
        def __init__(self, names: str) -> None:
            super().__init__()
            for name in names:
                self.add_module(name, nn.Linear(3, 3).double())

    model, other = Net("abc"), Net("cab")
    optimizer, fresh = _sirf(model, batch_size=2), _sirf(other, batch_size=2)
    for step in range(3):
        set_grads(list(model.parameters()), step)
        optimizer.step()
    fresh.load_state_dict(_through_a_file(optimizer.state_dict()))
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert list(mine) != list(theirs)
    for name, p in mine.items():
        assert same_bits(dict(fresh.state[theirs[name]]), dict(optimizer.state[p])), name


def test_parameters_without_names_are_matched_by_order() -> None:
    model, other = mlp(), mlp()
    optimizer, fresh = (
        SIRFShampoo(m.parameters(), batch_size=6, **SETTINGS) for m in (model, other)
    )
    train(model, optimizer, 3)
    fresh.load_state_dict(_through_a_file(optimizer.state_dict()))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(dict(fresh.state[q]), dict(optimizer.state[p]))


# --- torch.distributed.checkpoint ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("flat", "rule", "frozen"),
    [
        (False, PerParameter(), False),
        # flattened, groups come back with the keys that live groups have
        (True, PerParameter(), False),
        # torch asks for an entry of every parameter
        (False, LinearWeightBias(), False),
        # torch leaves out the state of frozen parameters
        (False, PerParameter(), True),
    ],
    ids=["nested", "flat", "joint parameters", "frozen parameters"],
)
def test_state_dicts_by_parameter_name_restore_training(
    flat: bool, rule: Any, frozen: bool
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def build() -> tuple[Any, SIRFShampoo]:
        model = mlp()
        model[2].requires_grad_(not frozen)
        groups = [{"params": model[4:].parameters()}, {"params": model[:4].parameters()}]
        return model, _sirf(model, groups, combine_params=(rule, PerParameter()))

    model, optimizer = build()
    train(model, optimizer, 3)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    weights = copy.deepcopy(model.state_dict())
    fresh_model, fresh = build()
    fresh_model.load_state_dict(weights)
    set_optimizer_state_dict(fresh_model, fresh, saved, options=options)
    train(model, optimizer, 3, start=3)
    train(fresh_model, fresh, 3, start=3)
    assert same_bits(values(fresh_model), values(model))


# --- what is in a checkpoint ---------------------------------------------------------------------


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_plain(k) and _plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return type(value) in (bool, int, float, str, type(None), Tensor)


class CustomRule(PerParameter):
    """A rule whose class exists here alone."""


def test_checkpoints_contain_tensors_and_plain_values_only() -> None:
    model = mlp()
    optimizer = _sirf(
        model,
        T=lambda step: True,
        structures={1: "diagonal", 2: ("hierarchical1_1", "dense")},
        preconditioner_dtypes={1: None, 2: (torch.bfloat16, torch.float32)},
        combine_params=(CustomRule(),),
    )
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    assert _plain(saved)
    assert set(saved) == {"state", "param_groups"}
    assert same_bits(_through_a_file(saved), saved)


@pytest.mark.parametrize("number", [np.float64(0.25), np.float32(0.25)])
def test_numpy_numbers_are_saved_as_plain_ones(number: Any) -> None:
    # schedules made with numpy put such numbers into groups; torch.load refuses them
    model = mlp()
    optimizer = _sirf(model)
    optimizer.param_groups[0]["lr"] = number
    saved = _through_a_file(optimizer.state_dict())
    assert saved["param_groups"][0]["lr"] == 0.25
    assert _plain(saved)


def test_state_dict_has_torchs_layout() -> None:
    model = mlp()
    groups = [{"params": model[4:].parameters()}, {"params": model[:4].parameters()}]
    optimizer = _sirf(model, groups)
    reference = torch.optim.SGD(
        [{"params": model[4:].parameters()}, {"params": model[:4].parameters()}], lr=0.1
    )
    saved = optimizer.state_dict()
    for mine, theirs in zip(
        saved["param_groups"], reference.state_dict()["param_groups"], strict=True
    ):
        assert mine["params"] == theirs["params"]
    places = [p for group in optimizer.param_groups for p in group["params"]]
    for i, entry in saved["state"].items():
        assert same_bits(entry, dict(optimizer.state[places[i]]))


def test_state_dict_shares_no_memory_with_the_optimizer() -> None:
    model = mlp()
    optimizer = _sirf(model, lr=torch.tensor(0.1))
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    train(model, optimizer, 2, start=2)
    optimizer.param_groups[0]["lr"].fill_(0.5)
    assert same_bits(saved, kept)
    before = snapshot(model, optimizer)
    for entry in saved["state"].values():
        for tensor in entry.values():
            tensor.fill_(1)
    saved["param_groups"][0]["lr"].fill_(7.0)
    assert same_bits(snapshot(model, optimizer), before)


def test_loading_neither_changes_nor_keeps_the_callers_dict() -> None:
    model = mlp()
    optimizer = _sirf(model, lr=torch.tensor(0.1))
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    ids = [(id(saved["state"][i]), id(entry["step"])) for i, entry in saved["state"].items()]
    fresh_model = mlp()
    fresh = _sirf(fresh_model, lr=torch.tensor(0.3))
    fresh.load_state_dict(saved)
    assert same_bits(saved, kept)
    assert ids == [(id(saved["state"][i]), id(e["step"])) for i, e in saved["state"].items()]
    train(fresh_model, fresh, 2)
    fresh.param_groups[0]["lr"].fill_(0.5)
    assert same_bits(saved, kept)


def test_one_unit_does_not_drag_its_stack_into_the_file() -> None:
    model = nn.ModuleList(nn.Linear(16, 16) for _ in range(30))
    optimizer = _sirf(model, batch_size=1)
    assert optimizer.buckets[0].rows == 30
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        for tensor in entry.values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    file = io.BytesIO()
    torch.save(saved["state"][0], file)
    assert file.tell() < 5 * 16 * 16 * 4 + 8192  # two factors, two momenta, one buffer, and the zip


@pytest.mark.parametrize("dumps", [pickle.dumps, lambda value: _saved_bytes(value)])
def test_pickled_optimizer_writes_every_stack_once(dumps: Callable[[Any], bytes]) -> None:
    model = nn.ModuleList(nn.Linear(16, 16) for _ in range(30))
    optimizer = _sirf(model, batch_size=1)
    state = sum(t.nbytes for bucket in optimizer.buckets for t in bucket.named_tensors().values())
    parameters = sum(p.nbytes for p in model.parameters())
    assert len(dumps(optimizer)) < 1.2 * (state + parameters) + 60_000


def _saved_bytes(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


# --- hyperparameters -----------------------------------------------------------------------------


def test_hyperparameters_come_from_the_checkpoint_as_torch_does() -> None:
    model = mlp()
    optimizer = _sirf(model, T=5)
    optimizer.param_groups[0]["lr"] = 0.0123
    optimizer.param_groups[0]["initial_lr"] = 0.5
    fresh = SIRFShampoo(mlp(), lr=1.0, T=2)
    fresh.load_state_dict(_through_a_file(optimizer.state_dict()))
    assert {key: fresh.param_groups[0][key] for key in (*SETTINGS, "T", "initial_lr")} == {
        **SETTINGS,
        "lr": 0.0123,
        "T": 5,
        "initial_lr": 0.5,
    }


@pytest.mark.parametrize("saved_lr", [0.25, torch.tensor(0.25)], ids=["float", "tensor"])
@pytest.mark.parametrize("live_lr", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
def test_learning_rate_is_loaded_whether_it_is_a_tensor_or_not(live_lr: Any, saved_lr: Any) -> None:
    saved = _sirf(mlp(), lr=copy.copy(saved_lr)).state_dict()
    live = live_lr.clone() if isinstance(live_lr, Tensor) else live_lr
    fresh = _sirf(mlp(), lr=live)
    fresh.load_state_dict(_through_a_file(saved))
    loaded = fresh.param_groups[0]["lr"]
    assert float(loaded) == 0.25
    assert loaded is live if isinstance(live, Tensor) else type(loaded) is float


def test_live_callable_stays_whatever_the_checkpoint_has() -> None:
    def live(step: int) -> bool:
        return step % 2 == 0

    for saved in (3, lambda step: True):
        optimizer = _sirf(mlp(), T=saved)
        fresh = _sirf(mlp(), T=live)
        fresh.load_state_dict(_through_a_file(optimizer.state_dict()))
        assert fresh.param_groups[0]["T"] is live


def test_callable_in_the_checkpoint_leaves_a_live_number_alone() -> None:
    optimizer = _sirf(mlp(), T=lambda step: True)
    model = mlp()
    fresh = _sirf(model, T=2)
    fresh.load_state_dict(_through_a_file(optimizer.state_dict()))
    assert fresh.param_groups[0]["T"] == 2
    train(model, fresh, 1)


def test_counted_batch_size_of_a_checkpoint_without_steps_leaves_a_given_one_alone() -> None:
    # was: the count of 0 replaces the given number: the next step "needs the batch size".
    fresh = _sirf(mlp(), batch_size=32)
    fresh.load_state_dict(_sirf(mlp()).state_dict())
    assert fresh.batch_size == 32


@dataclass
class Nothing(State):
    """No state."""


@dataclass(frozen=True)
class WithBetas(Strategy[Nothing]):
    """A strategy with a pair of numbers among its hyperparameters."""

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "lr": Hyperparameter(0.1, lambda v: v >= 0, "at least 0"),
        "betas": Hyperparameter((0.9, 0.99), lambda v: len(v) == 2, "a pair"),
        "weight_decay": Hyperparameter(0.0, lambda v: v >= 0, "at least 0"),
    }
    decay: ClassVar[Literal["before", "after", "inside"]] = "after"
    amount: int = 1

    def init(self, like: Tensor, structures: Any, dtypes: Any) -> Nothing:
        return Nothing()

    def update(
        self, state: Nothing, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext
    ) -> Tensor:
        return grad


def _with_betas(strategy: Strategy[Any], **hyperparameters: Any) -> StructuredOptimizer:
    return StructuredOptimizer(mlp(), strategy=strategy, hyperparameters=hyperparameters)


def test_pairs_of_numbers_come_from_the_checkpoint() -> None:
    optimizer = _with_betas(WithBetas(), betas=(0.5, 0.6))
    fresh = _with_betas(WithBetas())
    fresh.load_state_dict(_through_a_file(optimizer.state_dict()))
    assert fresh.param_groups[0]["betas"] == (0.5, 0.6)


def test_live_objects_stay_live() -> None:
    optimizer = _sirf(mlp())
    fresh = _sirf(mlp())
    live = {key: fresh.param_groups[0][key] for key in ("strategy", "combine_params", "params")}
    fresh.load_state_dict(_through_a_file(optimizer.state_dict()))
    assert all(fresh.param_groups[0][key] is value for key, value in live.items())
    assert fresh.param_groups[0]["structures"] == "dense"
    assert fresh.buckets[0].group is fresh.param_groups[0]


# --- attributes beside state ---------------------------------------------------------------------


def _through_load(model: nn.Module, optimizer: SIRFShampoo) -> SIRFShampoo:
    fresh = SIRFShampoo(mlp(), structures={1: "none", 2: ("dense", "hierarchical1_1")})
    fresh.load_state_dict(_through_a_file(optimizer.state_dict()))
    return fresh


WAYS: dict[str, Callable[[nn.Module, SIRFShampoo], SIRFShampoo]] = {
    "load": _through_load,
    "deepcopy": lambda model, optimizer: copy.deepcopy(optimizer),
    "pickle": lambda model, optimizer: pickle.loads(pickle.dumps(optimizer)),
}


def _dense(value: Any) -> Any:
    """Turn lists of tuples of structured matrices into lists of lists of tensors."""
    if isinstance(value, list | tuple):
        return [_dense(entry) for entry in value]
    return value.to_dense() if hasattr(value, "to_dense") else value


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_state_attributes_survive_every_way_of_copying(
    way: Callable[[nn.Module, SIRFShampoo], SIRFShampoo],
) -> None:
    model = mlp()
    optimizer = _sirf(model, structures={1: "none", 2: ("dense", "hierarchical1_1")})
    train(model, optimizer, 3)
    expected = {name: _dense(getattr(optimizer, name)) for name in optimizer.STATE_ATTRIBUTES}
    names = {"global_step", "batch_size", "preconditioner", "preconditioner_momenta"}
    assert set(expected) == names
    assert (expected["global_step"], expected["batch_size"]) == (3, 6)
    other = way(model, optimizer)
    for name, value in expected.items():
        assert same_bits(_dense(getattr(other, name)), value), name
    train(model, optimizer, 1)
    assert same_bits(_dense(other.preconditioner), expected["preconditioner"])


# --- checkpoints that do not fit -----------------------------------------------------------------


class Renamed(nn.Sequential):
    """The same layers under other names."""

    def __init__(self) -> None:
        super().__init__()
        for name, module in mlp().named_children():
            self.add_module(f"layer{name}", module)


def _wider() -> nn.Module:
    model = mlp()
    model[6] = nn.Linear(4, 3).double()
    return model


def _shorter() -> nn.Module:
    return mlp()[:6]


def _two_groups(model: Any) -> list[dict[str, Any]]:
    return [{"params": model[:2].parameters()}, {"params": model[2:].parameters()}]


Build = Callable[[], tuple[nn.Module, StructuredOptimizer]]


def _build(make: Callable[[], nn.Module] = mlp, **kwargs: Any) -> Build:
    def build() -> tuple[nn.Module, StructuredOptimizer]:
        model = make()
        return model, _sirf(model, **kwargs)

    return build


def _build_grouped() -> tuple[nn.Module, StructuredOptimizer]:
    model = mlp()
    return model, _sirf(model, _two_groups(model))


def _build_otherwise() -> tuple[nn.Module, StructuredOptimizer]:
    model = mlp()
    return model, StructuredOptimizer(model, strategy=WithBetas())


def _same(saved: dict[str, Any]) -> Any:
    return saved


def _without_a_unit(saved: dict[str, Any]) -> Any:
    del saved["state"][2]
    return saved


def _without_a_name(saved: dict[str, Any]) -> Any:
    del saved["state"][2]["momentum_buffer"]
    return saved


def _with_a_name(saved: dict[str, Any]) -> Any:
    saved["state"][2]["exp_avg"] = torch.zeros(3)
    return saved


def _misshapen(saved: dict[str, Any]) -> Any:
    saved["state"][7]["momentum_buffer"] = torch.zeros(3)
    return saved


def _flattened(saved: dict[str, Any]) -> Any:
    saved["state"][0]["momentum_buffer"] = saved["state"][0]["momentum_buffer"].flatten()
    return saved


def _not_a_tensor(saved: dict[str, Any]) -> Any:
    saved["state"][7]["momentum_buffer"] = "lost"
    return saved


def _without_groups(saved: dict[str, Any]) -> Any:
    return {"state": saved["state"]}


def _of_the_future(saved: dict[str, Any]) -> Any:
    saved["param_groups"][0]["format"] = 999
    return saved


def _of_a_model(saved: dict[str, Any]) -> Any:
    return mlp().state_dict()


def _of_adam(saved: dict[str, Any]) -> Any:
    model = mlp()
    adam = torch.optim.Adam(model.parameters())
    train(model, adam, 1)
    return adam.state_dict()


def _of_adam_with_names(saved: dict[str, Any]) -> Any:
    model = mlp()
    adam = torch.optim.Adam(model.named_parameters())
    train(model, adam, 1)
    return adam.state_dict()


def _no_dict(saved: dict[str, Any]) -> Any:
    return [saved]


MISFITS: dict[str, tuple[Build, Callable[[dict[str, Any]], Any], str]] = {
    "other structures": (_build(structures="diagonal"), _same, "structures"),
    "other structures in a dict": (
        _build(structures={1: "dense", 2: ("dense", "diagonal")}),
        _same,
        "structures",
    ),
    "other shapes": (_build(_wider), _same, r"6\.weight.*\(2, 4\).*\(3, 4\)"),
    "other rule": (_build(combine_params=(LinearWeightBias(), PerParameter())), _same, "combine"),
    "other strategy": (_build_otherwise, _same, "strategy"),
    "other names": (_build(Renamed), _same, r"layer0\.weight"),
    "fewer parameters": (_build(_shorter), _same, "8.*6"),
    "other groups": (_build_grouped, _same, r"8.*2, 6"),
    "missing unit": (_build(), _without_a_unit, r"2\.weight"),
    "missing entry": (_build(), _without_a_name, r"2\.weight.*momentum_buffer"),
    "unexpected entry": (_build(), _with_a_name, r"2\.weight.*exp_avg"),
    "misshapen entry": (_build(), _misshapen, r"6\.bias.*momentum_buffer.*\(3,\).*\(2,\)"),
    "flattened entry": (_build(), _flattened, r"0\.weight.*momentum_buffer.*\(12,\).*\(4, 3\)"),
    "no tensor": (_build(), _not_a_tensor, r"6\.bias.*momentum_buffer.*lost"),
    "no groups": (_build(), _without_groups, "param_groups"),
    "later format": (_build(), _of_the_future, "999"),
    "a model's": (_build(), _of_a_model, "param_groups"),
    "Adam's": (_build(), _of_adam, "no checkpoint of a structured optimizer"),
    "Adam's with names": (_build(), _of_adam_with_names, "no checkpoint of a structured"),
    "a list": (_build(), _no_dict, "no checkpoint of a structured optimizer"),
}


@pytest.mark.parametrize(("build", "damage", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_checkpoint_that_does_not_fit_says_so_and_changes_nothing(
    build: Build, damage: Callable[[dict[str, Any]], Any], message: str
) -> None:
    saving_model = mlp()
    saving = _sirf(saving_model)
    train(saving_model, saving, 3)
    saved = damage(_through_a_file(saving.state_dict()))
    kept = copy.deepcopy(saved)
    model, optimizer = build()
    set_grads(list(model.parameters()), 0)
    optimizer.batch_size = 6
    optimizer.step()
    before = snapshot(model, optimizer)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        optimizer.load_state_dict(saved)
    assert same_bits(snapshot(model, optimizer), before)
    assert same_bits(saved, kept)


def test_strategy_with_another_configuration_does_not_fit() -> None:
    saved = _with_betas(WithBetas(amount=3)).state_dict()
    with pytest.raises(CheckpointError, match=r"amount=3.*amount=2"):
        _with_betas(WithBetas(amount=2)).load_state_dict(saved)


def test_message_about_many_differences_stays_short() -> None:
    saved = _sirf(nn.ModuleList(nn.Linear(2, 2) for _ in range(50)), batch_size=1).state_dict()
    other = _sirf(nn.ModuleList(nn.Linear(3, 3) for _ in range(50)), batch_size=1)
    with pytest.raises(CheckpointError, match=r"(?s)0\.weight.*and \d+ more") as caught:
        other.load_state_dict(saved)
    assert len(str(caught.value).splitlines()) < 40


def test_failing_load_leaves_training_to_go_on_to_the_bit() -> None:
    model = mlp()
    optimizer = _sirf(model)
    train(model, optimizer, 2)
    twin, clone = copy.deepcopy((model, optimizer))
    saved = optimizer.state_dict()
    saved["state"][7]["momentum_buffer"] = torch.zeros(3)
    saved["param_groups"][0]["lr"] = 100.0
    with pytest.raises(CheckpointError):
        optimizer.load_state_dict(saved)
    train(model, optimizer, 3, start=2)
    train(twin, clone, 3, start=2)
    assert same_bits(values(model), values(twin))


def test_other_optimizers_refuse_or_load_but_do_not_mix() -> None:
    model = mlp()
    optimizer = _sirf(model)
    train(model, optimizer, 1)
    adam = torch.optim.Adam(list(model.parameters())[:3])
    with pytest.raises(ValueError, match="parameter group"):
        adam.load_state_dict(optimizer.state_dict())
