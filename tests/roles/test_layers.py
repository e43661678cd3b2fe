"""Layers of torch, of other libraries, and parameters without one."""

from __future__ import annotations

from typing import get_args

import torch
from torch import nn

from structprecond.roles import ROLES, RoleName, infer_roles
from tests.roles.helpers import (
    HEAD,
    LINEAR,
    NORM,
    Bag,
    at,
    check,
    param,
)


def test_names_of_roles():
    assert ROLES == (
        "embedding", "head", "norm", "bias", "conv", "depthwise", "fused_qkv", "experts", "stack",
        "router", "matrix", "other",
    )  # fmt: skip
    assert get_args(RoleName) == ROLES


def test_recurrent():
    model = Bag(emb=nn.Embedding(9, 1), rnn=nn.LSTM(1, 4, num_layers=2, proj_size=2),
                cell=nn.GRUCell(2, 4), fc=nn.Linear(4, 2))  # fmt: skip
    one = {"weight_ih": "matrix", "weight_hh": "matrix", "bias_ih": "bias", "bias_hh": "bias"}
    rnn = {f"{name}_l{i}": role for i in range(2) for name, role in one.items()}
    rnn |= {"weight_hr_l0": "matrix", "weight_hr_l1": "matrix"}
    check(model, {"emb.weight": "embedding"} | at("", rnn=rnn, cell=one, fc=HEAD))


def test_norms():
    norms = [nn.LayerNorm((2, 3)), nn.GroupNorm(1, 4), nn.BatchNorm3d(4), nn.SyncBatchNorm(4),
             nn.InstanceNorm1d(4, affine=True)]  # fmt: skip
    model = nn.Sequential(*norms, nn.RMSNorm((2, 3)))
    expected = at("0", "1", "2", "3", "4", **{"": NORM}) | {"5.weight": "norm"}
    check(model, expected)

    class Scaled(nn.LayerNorm):
        """Recognized by its base class."""

    class FrozenNorm2d(nn.Module):
        """Recognized by its name, also with several axes."""

        def __init__(self) -> None:
            super().__init__()
            self.gain, self.bias = param(1, 4, 1, 1), param(4, 4)

    class NormLinear(nn.Linear):
        """Not a norm."""

    model = nn.Sequential(Scaled(3), FrozenNorm2d(), NormLinear(3, 3), nn.Linear(3, 3))
    expected = at("0", **{"": NORM}) | {"1.gain": "norm", "1.bias": "norm"}
    check(model, expected | at("2", **{"": LINEAR}) | at("3", **{"": HEAD}))


def test_classes_are_known_by_the_ends_of_their_names():
    class ParallelLinear(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.weight, self.bias, self.scale = param(*shape), param(4), param(4)

    class NormMLP(Bag):
        pass

    class PatchEmbedding(nn.Linear):
        pass

    model = nn.Sequential(NormMLP(w=param(4, 4)), PatchEmbedding(4, 4), ParallelLinear(3, 4, 4),
                          ParallelLinear(4, 4))  # fmt: skip
    scale = {"scale": "other"}
    grouped = {"weight": "stack", "bias": "bias"}
    expected = {"0.w": "matrix"} | at("1", **{"": LINEAR})
    check(model, expected | at("2", **{"": grouped | scale}) | at("3", **{"": HEAD | scale}))


def test_bias_of_a_layer_named_norm():
    model = Bag(norm_proj=nn.Linear(4, 4), out=nn.Linear(4, 2))
    check(model, at("", norm_proj=LINEAR, out=HEAD))


def test_convolutions():
    layers = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
              nn.ConvTranspose3d]  # fmt: skip
    model = nn.Sequential(*[layer(2, 4, 1) for layer in layers])
    check(model, at("0", "1", "2", "3", "4", "5", **{"": {"weight": "conv", "bias": "bias"}}))


def test_embeddings():
    class RotaryEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.bias, self.scale = param(1, 5, 4), param(4), param(1)

    model = Bag(a=nn.Embedding(5, 4), b=nn.EmbeddingBag(5, 4), c=RotaryEmbedding(),
                relative_position_bias_table=param(9, 2), mask_token=param(1, 4),
                wpe=param(5, 4), tok_embeddings=param(5, 4))  # fmt: skip
    check(model, {
        "relative_position_bias_table": "embedding", "mask_token": "embedding",
        "wpe": "embedding", "tok_embeddings": "embedding",
        "a.weight": "embedding", "b.weight": "embedding",
        "c.table": "embedding", "c.bias": "bias", "c.scale": "other",
    })  # fmt: skip


def test_other():
    model = Bag(temperature=nn.Parameter(torch.tensor(1.0)), layer_scale=param(4, 1, 1),
                query=param(1, 4), act=nn.PReLU(), mix=nn.Bilinear(2, 3, 4))  # fmt: skip
    roles = check(model, {
        "temperature": "other", "layer_scale": "other", "query": "other",
        "act.weight": "other", "mix.weight": "other", "mix.bias": "bias",
    })  # fmt: skip
    check(Bag(A_log=param(4, 3), log_dt=param(4, 3)), {"A_log": "other", "log_dt": "other"})
    assert "'mix.weight'" in roles["mix.weight"].reason
    assert "3 axes" in roles["mix.weight"].reason
    blocks = infer_roles(nn.ModuleList([nn.ModuleList([nn.PReLU()])]))
    assert "'0.*.weight'" in blocks["0.0.weight"].reason  # one pattern for all of a list


def test_bare_parameters_by_shape():
    shapes = [(4, 3), (4,), (), (4, 3, 2), (4, 3, 2, 2), (4, 3, 2, 2, 2), (1, 4, 1, 1)]
    model = nn.ParameterList([param(*shape) for shape in shapes])
    kinds = ["matrix", "other", "other", "other", "conv", "conv", "other"]
    roles = check(model, {str(i): kind for i, kind in enumerate(kinds)})
    assert "by its shape" in roles["4"].reason


def test_bare_parameters_by_name():
    names = {
        "emb": "embedding", "wte": "embedding", "lm_head": "head", "norm": "norm",
        "final_norm_weight": "norm", "bias": "bias", "w_bias": "bias", "wqkv": "fused_qkv",
        "w1": "matrix", "member": "matrix", "b1": "other", "wte_weight": "embedding",
        "square_qkv": "matrix",
    }  # fmt: skip
    shapes = {"emb": (9, 4), "wte": (9, 4), "lm_head": (9, 4), "wqkv": (4, 12), "w1": (4, 4),
              "member": (4, 4), "wte_weight": (9, 4), "square_qkv": (4, 4)}  # fmt: skip
    model = nn.ParameterDict({name: param(*shapes.get(name, (4,))) for name in names})
    check(model, names)
    check(Bag(**model, fc=nn.Linear(3, 3)), names | at("", fc=LINEAR))  # the bare head is the head


def test_lists_and_custom_layers_by_their_own_name():
    class Layer(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.weight, self.bias = param(*shape), param(shape[0])

    model = Bag(pos_embeds=nn.ParameterList([param(1, 5, 4)]), tok_emb=Layer(9, 4), ln_1=Layer(4),
                qkv=Layer(12, 4), up=Layer(4, 4), patch_embed=Layer(4, 3, 2, 2),
                lm_head=Layer(9, 4))  # fmt: skip
    check(Bag(tok_emb=Bag(mix=param(4, 4))), {"tok_emb.mix": "matrix"})
    check(model, at(
        "", pos_embeds={"0": "embedding"}, tok_emb={"weight": "embedding", "bias": "bias"},
        ln_1=NORM, qkv={"weight": "fused_qkv", "bias": "bias"}, up=LINEAR,
        patch_embed={"weight": "conv", "bias": "bias"}, lm_head=HEAD,
    ))  # fmt: skip
