"""Checkpoint files that are damaged, foreign, of another model or of an older version."""

from __future__ import annotations

import copy
import io
import pickle
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import (
    SOAP,
    AdamW,
    CheckpointError,
    LinearWeightBias,
    Muon,
    PerParameter,
    Shampoo,
    SIRFShampoo,
    StructPrecondError,
)
from structprecond.core.routing import as_routing
from tests.data import make_checkpoint
from tests.every_strategy import MAKERS, Make, every_strategy
from tests.helpers import (
    assert_close,
    mlp,
    same_bits,
    saved_bytes,
    set_grads,
    snapshot,
    through_a_file,
    values,
)


def _trained(make: Make, model: Any = None, steps: int = 4) -> tuple[Any, Any]:
    """Return a model and its optimizer after a few steps."""
    model = mlp() if model is None else model
    optimizer = make(model)
    _go_on(model, optimizer, range(steps))
    return model, optimizer


def _go_on(model: Any, optimizer: Any, steps: range) -> None:
    """Make steps with gradients that depend on the step and the parameter's name."""
    for step in steps:
        set_grads([p for _, p in sorted(model.named_parameters())], step)
        optimizer.step()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


def _same_content(optimizer: Any, saved: Any) -> bool:
    """Return whether an optimizer equals a state dict bit for bit."""
    own = optimizer.state_dict()
    for entry in (*own["state"].values(), *saved["state"].values()):
        entry.pop("batch_size")  # a given batch size stays as it is
        # any nonzero byte is True
        entry |= {name: t.int().bool() for name, t in entry.items() if t.dtype == torch.bool}
    names = as_routing(optimizer.param_groups[0]["strategy"]).hyperparameters
    mine, theirs = ([{k: g[k] for k in names} for g in d["param_groups"]] for d in (own, saved))
    return same_bits(own["state"], saved["state"]) and same_bits(mine, theirs)


def _load(model: Any, optimizer: Any, saved: Any, before: Any = None) -> bool:
    """Load, and return whether that worked; if not, nothing may have changed.

    Args:
        model: The model.
        optimizer: Its optimizer.
        saved: What to load.
        before: A snapshot of both as they are, if there is one.
    """
    before = snapshot(model, optimizer) if before is None else before
    try:
        optimizer.load_state_dict(saved)
    except CheckpointError:
        assert same_bits(snapshot(model, optimizer), before)
        return False
    return True


# --- damaged files -------------------------------------------------------------------------------


DAMAGED = {"SOAP": partial(SOAP, lr=0.02, precondition_frequency=2), "Muon": partial(Muon, lr=0.02)}


@pytest.mark.parametrize("make", DAMAGED.values(), ids=DAMAGED)
def test_truncated_files_are_not_loaded(make: Make) -> None:
    whole = saved_bytes(_trained(make)[1].state_dict())
    rng = random.Random(0)
    for length in [0, 1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(40))]:
        with pytest.raises((RuntimeError, ValueError, EOFError, pickle.UnpicklingError)):
            torch.load(io.BytesIO(whole[:length]))


@pytest.mark.parametrize("make", DAMAGED.values(), ids=DAMAGED)
def test_flipped_bits_are_noticed_or_harmless(make: Make) -> None:
    """Flipped bits that torch does not notice are refused, or loaded as they are."""
    whole = saved_bytes(_trained(make)[1].state_dict())
    model, optimizer = _trained(make, steps=2)
    start = optimizer.state_dict()
    before = snapshot(model, optimizer)
    rng, outcomes = random.Random(0), set()
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        try:
            saved = torch.load(io.BytesIO(damaged))
        except Exception:  # found by torch
            outcomes.add("torch")
            continue
        if _load(model, optimizer, saved, before):
            outcomes.add("loaded")
            assert _same_content(optimizer, saved)
            optimizer.load_state_dict(start)
            before = snapshot(model, optimizer)
    assert {"torch", "loaded"} <= outcomes


JUNK: list[Any] = [
    None, True, -1, 3, 1.5, float("nan"), "x", (), (1, 2), [], [0], {}, {0: 1}, {"a": 2},
    torch.ones(()), torch.ones(3), torch.ones(4, 3, dtype=torch.complex64), b"x", 1j, range(3),
    torch.ones(4, 3, device="meta"), torch.eye(3).to_sparse(), object(), torch.float32,
]  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to everything in nested dicts and lists."""
    if isinstance(value, dict):
        items = list(value.items())
    else:
        items = list(enumerate(value)) if isinstance(value, list) else []
    for key, entry in items:
        yield (*path, key)
        yield from _places(entry, (*path, key))


def _copied(value: Any) -> Any:
    """Copy nested dicts and lists, but not the tensors in them, of which there are many."""
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    return [*map(_copied, value)] if isinstance(value, list) else value


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@pytest.mark.parametrize("make", DAMAGED.values(), ids=DAMAGED)
def test_anything_anywhere_is_refused_or_used_as_it_is(make: Make) -> None:
    """Each value of a checkpoint is removed, or replaced by something else."""
    saved = _trained(make)[1].state_dict()
    model, optimizer = _trained(make, steps=2)
    start, before = optimizer.state_dict(), snapshot(model, optimizer)
    rng = random.Random(0)
    refused = loaded = 0
    for *path, last in list(_places(saved)):
        for junk in rng.sample(JUNK, 6):
            damaged = _copied(saved)
            parent = damaged
            for key in path:
                parent = parent[key]
            if junk is None:
                del parent[last]
            else:
                parent[last] = junk
            if _load(model, optimizer, damaged, before):
                loaded += 1
                own = optimizer.state_dict()
                if path and path[0] == "state":  # the values were loaded, except for casts
                    assert own["state"].keys() == damaged["state"].keys()
                _go_on(model, optimizer, range(2))  # later steps still work
                assert all(t.isfinite().all() for t in _tensors(own["state"]))
                optimizer.load_state_dict(start)
                before = snapshot(model, optimizer)
            else:
                refused += 1
    assert refused > 5 * loaded > 0


# --- foreign files -------------------------------------------------------------------------------


def _of_torch(cls: Any, **kwargs: Any) -> Callable[[], Any]:
    def make() -> Any:
        model = mlp()
        optimizer = cls(model.parameters(), **kwargs)
        set_grads(list(model.parameters()), 0)
        optimizer.step()
        return optimizer.state_dict()

    return make


FOREIGN: dict[str, Callable[[], Any]] = {
    "Adam": _of_torch(torch.optim.Adam),
    "SGD": _of_torch(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adafactor": _of_torch(torch.optim.Adafactor),
    "a model": lambda: mlp().state_dict(),
    "a scheduler": lambda: torch.optim.lr_scheduler.StepLR(AdamW(mlp()), 2).state_dict(),
    "a scaler": lambda: torch.amp.GradScaler("cpu").state_dict(),
    "a training checkpoint": lambda: {
        "model": mlp().state_dict(), "optimizer": AdamW(mlp()).state_dict()
    },
    "nothing": lambda: None,
    "a number": lambda: 3,
    "a text": lambda: "checkpoint.pt",
    "a tensor": lambda: torch.ones(3),
    "a list": lambda: [1, 2],
    "an empty dict": dict,
    "no state": lambda: {"param_groups": AdamW(mlp()).state_dict()["param_groups"]},
    "no groups": lambda: {"state": {}, "param_groups": []},
    "groups that are a number": lambda: {"state": {}, "param_groups": 3},
    "groups that are numbers": lambda: {"state": {}, "param_groups": [3]},
    "groups by name": lambda: {"state": {}, "param_groups": {"a": {"params": []}}},
    "state that is a list": lambda: {
        "state": [], "param_groups": AdamW(mlp()).state_dict()["param_groups"]
    },
}  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_files_are_refused(what: str) -> None:
    model, optimizer = _trained(MAKERS["SOAP"])
    saved = FOREIGN[what]()
    before, kept = snapshot(model, optimizer), copy.deepcopy(saved)
    with pytest.raises(CheckpointError, match=r"state_dict\(\)|Build the optimizer as it was"):
        optimizer.load_state_dict(saved)
    assert same_bits(snapshot(model, optimizer), before)
    assert same_bits(saved, kept)


@every_strategy
def test_checkpoints_of_every_other_strategy_are_refused(make: Make) -> None:
    model, optimizer = _trained(make)
    for name, other in MAKERS.items():
        saved = _trained(other, steps=1)[1].state_dict()
        if other is make:
            optimizer.load_state_dict(saved)
        elif not _same_configuration(optimizer, saved):
            before = snapshot(model, optimizer)
            with pytest.raises(CheckpointError, match=r"param group 0: |0\.weight"):
                optimizer.load_state_dict(saved)
            assert same_bits(snapshot(model, optimizer), before), name


def _same_configuration(optimizer: Any, saved: Any) -> bool:
    """Return whether two runs differ only in their hyperparameters."""
    mine, theirs = optimizer.state_dict()["param_groups"][0], saved["param_groups"][0]
    return all(mine[key] == theirs[key] for key in ("strategy", "structures", "combine_params"))


# --- what does not fit ---------------------------------------------------------------------------


def _set(*path: Any, to: Any) -> Callable[[Any], None]:
    def change(saved: Any) -> None:
        for key in path[:-1]:
            saved = saved[key]
        saved[path[-1]] = to

    return change


GROUP, ENTRY = ("param_groups", 0), ("state", 2)
MISFITS: dict[str, tuple[Callable[[Any], None], str]] = {
    "complex": (
        _set(*ENTRY, "exp_avg", to=torch.ones(4, 4) * 1j),
        r"2\.weight: exp_avg is torch\.complex64.*into torch\.float64",
    ),
    "sparse": (
        _set(*ENTRY, "exp_avg", to=torch.eye(4).to_sparse()),
        r"2\.weight: exp_avg .*torch\.sparse_coo",
    ),
    "without values": (
        _set(*ENTRY, "exp_avg", to=torch.ones(4, 4, device="meta")),
        r"2\.weight: exp_avg .*on meta",
    ),
    "fractional steps": (_set(*ENTRY, "step", to=torch.tensor(1.5)), r"2\.weight: step .*int64"),
    "no tensor": (_set(*ENTRY, "step", to=3), r"2\.weight: step is 3, expected \(\)"),
    "other shape": (
        _set(*ENTRY, "factors.1.mat", to=torch.ones(4, 5)),
        r"2\.weight: factors\.1\.mat is \(4, 5\), expected \(4, 4\)",
    ),
    "missing": (lambda saved: saved["state"][2].pop("exp_avg"), r"2\.weight: missing exp_avg"),
    "unexpected": (_set(*ENTRY, "foo", to=torch.ones(1)), r"2\.weight: unexpected foo"),
    "missing parameter": (lambda saved: saved["state"].pop(3), r"2\.bias: missing step"),
    "state of nobody": (_set("state", 99, to={}), r"state of a parameter 99 in no group"),
    "other names": (
        lambda saved: saved["param_groups"][0].update(
            param_names=["a", *saved["param_groups"][0]["param_names"]][:8]
        ),
        r"6\.bias: not in the checkpoint.*a: not in the optimizer",
    ),
    "steps that contradict each other": (
        _set(*ENTRY, "global_step", to=torch.tensor(9)), "global_step.*different ones"
    ),
    "missing number": (
        lambda saved: saved["param_groups"][0].pop("eps"), "param group 0: eps is missing"
    ),
    "text for a number": (_set(*GROUP, "lr", to="0.1"), r"param group 0: lr must be.*got '0\.1'"),
    "NaN": (_set(*GROUP, "lr", to=float("nan")), r"param group 0: lr must be.*got nan"),
    "three betas": (_set(*GROUP, "betas", to=(0.9, 0.9, 0.9)), "param group 0: betas must be"),
    "no numbers": (_set(*GROUP, "betas", to="x"), "param group 0: betas must be.*'x'"),
    "more numbers": (_set(*GROUP, "initial_lr", to=torch.ones(2)), "damaged.*Tensor"),
    "unhashable names": (_set(*GROUP, "param_names", to=[[1]] * 8), "damaged.*unhashable"),
    "unknown format": (_set(*GROUP, "format", to=3), r"has format \[3\].*reads.*\[1, 2\]"),
    "format of another kind": (_set(*GROUP, "format", to="new"), r"has format \['new'\]"),
    "fewer parameters": (_set(*GROUP, "params", to=[0]), r"param groups have \[1\].*have \[8\]"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), MISFITS.values(), ids=MISFITS)
def test_misfits_are_named_and_change_nothing(damage: Callable[[Any], None], message: str) -> None:
    model, optimizer = _trained(partial(SOAP, precondition_frequency=2))
    saved = _trained(partial(SOAP, precondition_frequency=2), steps=2)[1].state_dict()
    damage(saved)
    before = snapshot(model, optimizer)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        optimizer.load_state_dict(saved)
    assert same_bits(snapshot(model, optimizer), before)


def test_all_misfits_are_in_one_message() -> None:
    _, optimizer = _trained(SOAP)
    saved = _trained(SOAP)[1].state_dict()
    for name in ("complex", "missing", "unexpected", "missing parameter", "three betas"):
        MISFITS[name][0](saved)
    with pytest.raises(CheckpointError) as caught:
        optimizer.load_state_dict(saved)
    for name in ("unexpected", "missing parameter", "three betas"):
        assert re.search(MISFITS[name][1], str(caught.value)), name


# --- what loading does ---------------------------------------------------------------------------


class Shuffled(nn.Module):
    """Layers that are registered in a given order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        sizes = {"a": (3, 4), "b": (4, 4), "c": (4, 4), "d": (4, 2)}
        for name in order:
            self.add_module(name, nn.Linear(*sizes[name]).double())


@pytest.mark.parametrize("rules", [None, (LinearWeightBias(), PerParameter())])
@pytest.mark.parametrize(
    "make",
    [
        partial(SOAP, lr=0.02, precondition_frequency=3, refresh="staggered"),
        partial(SIRFShampoo, lr=0.02, batch_size=4, T=2),
        partial(Muon, lr=0.02),
    ],
)
def test_parameters_in_another_order_go_on_alike(make: Make, rules: Any) -> None:
    given = {} if rules is None else {"combine_params": rules}
    model, optimizer = _trained(partial(make, **given), Shuffled("abcd"))
    other = Shuffled("bcad")  # d stays last, since it is the head
    fresh = make(other, **given)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    _go_on(model, optimizer, range(4, 12))
    _go_on(other, fresh, range(4, 12))
    for name, p in other.named_parameters():
        assert_close(p.detach(), model.get_parameter(name).detach(), 1e-10)


@every_strategy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_of_the_live_state_stay(make: Make, dtype: torch.dtype) -> None:
    saved = _trained(make)[1].state_dict()
    model, optimizer = _trained(make, mlp(dtype), steps=2)
    before = {name: t for b in optimizer.buckets for name, t in b.named_tensors().items()}
    dtypes = [{k: t.dtype for k, t in b.named_tensors().items()} for b in optimizer.buckets]
    assert before
    optimizer.load_state_dict(saved)
    assert dtypes == [{k: t.dtype for k, t in b.named_tensors().items()} for b in optimizer.buckets]
    for loaded, original in zip(
        _tensors(optimizer.state_dict()["state"]), _tensors(saved["state"]), strict=True
    ):
        assert torch.equal(loaded, original.to(loaded.dtype))
    _go_on(model, optimizer, range(2))
    assert all(p.isfinite().all() and p.dtype == dtype for p in model.parameters())


@every_strategy
def test_checkpoint_and_optimizer_share_nothing(make: Make) -> None:
    lr = torch.tensor(0.01)

    def build() -> tuple[Any, Any]:
        model, optimizer = _trained(make)
        optimizer.param_groups[0]["lr"] = lr.clone()
        optimizer.param_groups[0]["history"] = [1, [2]]  # as users do
        return model, optimizer

    model, optimizer = build()
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    _, fresh = build()
    loaded = copy.deepcopy(saved)
    fresh.load_state_dict(loaded)
    for one, state_dict in ((optimizer, saved), (fresh, loaded)):
        stacks = [t for bucket in one.buckets for t in bucket.named_tensors().values()]
        own = {t.untyped_storage().data_ptr() for t in [*stacks, one.param_groups[0]["lr"]]}
        own |= {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert not own & {t.untyped_storage().data_ptr() for t in _tensors(state_dict) if t.numel()}
        one.param_groups[0]["history"][1].append(3)
        one.param_groups[0]["lr"].fill_(7.0)
        _go_on(model, optimizer, range(1))
    assert same_bits(saved, kept)
    assert same_bits(loaded, kept)


def test_callables_are_known_again_in_another_process() -> None:
    """Addresses differ in another process; equal objects that are made twice simulate this."""

    def make(limit: float) -> Muon:
        clamp = partial(torch.clamp, max=limit)
        return Muon(mlp(), after_weight_update=clamp)

    first, second = make(1.0), make(1.0)
    assert "0x" not in str(first.state_dict()["param_groups"])
    second.load_state_dict(first.state_dict())
    with pytest.raises(CheckpointError, match=r"max=1\.0.*max=2\.0"):
        make(2.0).load_state_dict(first.state_dict())


def test_descriptions_leave_defaults_out() -> None:
    """A field that a later version adds does not make older checkpoints unusable."""
    group = SOAP(mlp(), merge_dims=True, max_precond_dim=50, clip_rms=2.0).state_dict()[
        "param_groups"
    ][0]
    assert group["strategy"] == "SOAPStrategy(max_precond_dim=50, clip_rms=2.0)"
    assert group["combine_params"] == ("MergeDims(max_dim=50)",)
    routed = Muon(mlp(), nesterov=True).state_dict()["param_groups"][0]["strategy"]
    assert routed.startswith("Routing(main=MuonStrategy(nesterov=True), roles={")
    other = Shampoo(mlp(), exponent=0.5, grafting="sgd").state_dict()["param_groups"][0]
    assert other["strategy"] == "ShampooStrategy(grafting='sgd', exponent=0.5)"


# --- entries of the state ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("exp_avg", "lost", "got.*'exp_avg': \"'lost'\""),
        ("exp_avg", None, "'exp_avg': 'None'"),
        ("exp_avg", torch.ones(4, 3) * 1j, "complex64"),
        ("exp_avg", torch.eye(4, 3).to_sparse(), "sparse"),
        ("exp_avg", torch.ones(4, 3, device="meta"), "meta"),
        ("exp_avg", torch.ones(3, 4), r"'exp_avg': \(3, 4\)"),
        ("momentum", torch.ones(4, 3), r"'momentum': \(4, 3\)"),
    ],
)
def test_entries_refuse_what_they_cannot_hold(name: str, value: Any, message: str) -> None:
    model, optimizer = _trained(AdamW)
    before = snapshot(model, optimizer)
    entry = optimizer.state[model[0].weight]
    with pytest.raises(StructPrecondError, match=rf"(?s)0\.weight has tensors.*{message}"):
        entry[name] = value
    with pytest.raises(StructPrecondError, match=r"0\.weight has tensors"):
        entry.update({"step": 3, name: value})
    assert same_bits(snapshot(model, optimizer), before)


@pytest.mark.parametrize("value", [None, 3, "x", [1]])
def test_entries_replaced_by_something_else_raise_at_the_step(value: Any) -> None:
    model, optimizer = _trained(AdamW)
    optimizer.state[model[0].weight] = value
    before = values(model)
    with pytest.raises(StructPrecondError, match=r"0\.weight has tensors"):
        optimizer.step()
    assert same_bits(values(model), before)


# --- older versions ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", make_checkpoint.OPTIMIZERS)
@pytest.mark.parametrize("version", [1, 2])
def test_checkpoints_of_older_versions_go_on_to_where_they_went_then(
    version: int, name: str
) -> None:
    file = Path(make_checkpoint.__file__).with_name(f"checkpoint_v{version}.pt")
    content = torch.load(file)
    recorded = content["optimizers"][name]
    model, optimizer = make_checkpoint.build(name)
    model.load_state_dict(recorded["model"])
    optimizer.load_state_dict(recorded["optimizer"])
    assert optimizer.global_step == make_checkpoint.BEFORE
    for grads in content["gradients"]:
        make_checkpoint.step(model, optimizer, grads)
    assert_close(values(model), recorded["expected"], 1e-9)
