"""Parametrized parameters, wrapped modules, and tables of roles."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from structprecond.errors import StructPrecondError
from structprecond.roles import infer_roles
from tests.roles.helpers import (
    GPT,
    GPT_BLOCK,
    HEAD,
    LINEAR,
    Bag,
    at,
    check,
    gpt,
    gpt_blocks,
    mlp,
    param,
)


def test_parametrizations():
    model = Bag(
        conv=parametrizations.spectral_norm(nn.Conv2d(2, 3, 3)),
        fc=parametrizations.weight_norm(nn.Linear(3, 3)),
        square=parametrizations.orthogonal(nn.Linear(3, 3)),
        emb=parametrizations.spectral_norm(nn.Embedding(5, 3)),
        head=parametrizations.weight_norm(nn.Linear(3, 2)),
    )
    weight = "parametrizations.weight.original"
    roles = check(model, {
        "conv.bias": "bias", f"conv.{weight}": "conv",
        "fc.bias": "bias", f"fc.{weight}0": "other", f"fc.{weight}1": "matrix",
        "square.bias": "bias", f"square.{weight}": "matrix",
        f"emb.{weight}": "embedding",
        "head.bias": "bias", f"head.{weight}0": "other", f"head.{weight}1": "head",
    })  # fmt: skip
    assert roles[f"fc.{weight}1"].reason == "weight of Linear"


def test_parametrized_bias_and_recurrence():
    fc = nn.Linear(3, 2)
    nn.utils.parametrize.register_parametrization(fc, "bias", nn.Tanh())
    check(fc, {"weight": "head", "parametrizations.bias.original": "bias"})
    rnn = parametrizations.weight_norm(nn.RNN(3, 4, bias=False), "weight_hh_l0")
    path = "parametrizations.weight_hh_l0.original"
    check(rnn, {"weight_ih_l0": "matrix", f"{path}0": "other", f"{path}1": "matrix"})


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_older_stand_ins():
    fc, head = nn.utils.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2)
    prune.identity(head, "weight")
    check(nn.Sequential(fc, head), {
        "0.bias": "bias", "0.weight_g": "other", "0.weight_v": "matrix",
        "1.bias": "bias", "1.weight_orig": "head",
    })  # fmt: skip


def test_wrappers_do_not_count():
    """Wrappers around a model, a block or a layer change no role."""
    module = GPT | gpt_blocks()
    check(Bag(module=gpt()), {f"module.{name}": role for name, role in module.items()})
    compiled = Bag(module=Bag(_orig_mod=gpt()))
    check(compiled, {f"module._orig_mod.{name}": role for name, role in module.items()})
    model: Any = gpt()
    model.lm_head = Bag(_orig_mod=model.lm_head)
    for i in range(2):
        block = model.transformer["h"][i]
        block.attn.c_attn = Bag(_checkpoint_wrapped_module=block.attn.c_attn)
        model.transformer["h"][i] = Bag(_orig_mod=block)
    inner = {name: role for name, role in GPT.items() if name != "lm_head.weight"}
    wrapped = "c_attn._checkpoint_wrapped_module"
    block = {name.replace("c_attn", wrapped): role for name, role in GPT_BLOCK.items()}
    paths = ("transformer.h.0._orig_mod", "transformer.h.1._orig_mod")
    check(model, inner | {"lm_head._orig_mod.weight": "head"} | at(*paths, **{"": block}))
    check(Bag(module=nn.Linear(3, 2)), at("module", **{"": HEAD}))
    layers = nn.ModuleList([Bag(_orig_mod=nn.Linear(3, 3)) for _ in range(2)])
    check(layers, at("0._orig_mod", **{"": LINEAR}) | at("1._orig_mod", **{"": HEAD}))


def test_wrappers_of_torch():
    compiled: Any = torch.compile(mlp(3, 4, 2), backend="eager")
    check(compiled, at("_orig_mod", **{"0": LINEAR, "2": HEAD}))
    check(nn.DataParallel(mlp(3, 4, 2)), at("module", **{"0": LINEAR, "2": HEAD}))
    check(AveragedModel(mlp(3, 4, 2)), at("module", **{"0": LINEAR, "2": HEAD}))


def test_frozen_parameters_and_the_meta_device():
    expected = GPT | gpt_blocks()
    check(gpt().requires_grad_(False), expected)
    with torch.device("meta"):
        model = gpt()
    check(model, expected)
    check(copy.deepcopy(model), expected)


def test_empty_parameters_and_empty_models():
    check(nn.ParameterList([param(0, 3), param(0)]), {"0": "matrix", "1": "other"})
    for model in (nn.Sequential(), nn.ReLU()):
        assert infer_roles(model) == {}
    assert str(infer_roles(nn.ReLU())).split("\n")[0] == "parameter  shape  role  reason"


def test_lazy_parameters_are_refused():
    model = Bag(body=nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(StructPrecondError, match=r"body\.0\.weight of LazyLinear .* forward"):
        infer_roles(model)


def test_table_is_aligned():
    model = Bag(scale=nn.Parameter(torch.tensor(1.0)), conv=nn.Conv2d(3, 4, 2))
    lines = [
        "parameter    shape    role   reason",
        "--------------------------------------------------------------------------------",
        "scale        scalar   other  a vector or scalar, in Bag; to route it, match 'scale'",
        "conv.weight  4x3x2x2  conv   weight of Conv2d",
        "conv.bias    4        bias   bias of Conv2d",
    ]
    lines[1] = "-" * len(lines[2])
    assert str(infer_roles(model)).split("\n") == lines


def test_time_is_linear():
    """Comparing every layer with every other would take minutes."""
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(2000)])
    blocks = nn.Sequential(*[nn.Sequential(nn.Linear(1, 1), nn.ReLU()) for _ in range(2000)])
    start = time.perf_counter()
    assert len(infer_roles(model)) == 4000
    assert len(infer_roles(blocks)) == 4000
    assert time.perf_counter() - start < 2
