"""The role of every parameter of models as people write them, each spelled out by hand."""

from __future__ import annotations

import copy
import time
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from structprecond.errors import StructPrecondError
from structprecond.roles import ROLES, RoleName, infer_roles
from tests.roles.helpers import (
    ATTENTION,
    CONV,
    HEAD,
    LINEAR,
    NORM,
    Bag,
    Expected,
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


# --- language models -----------------------------------------------------------------------------


def test_transformer_has_no_head():
    model = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
    feed = {"linear1": LINEAR, "linear2": LINEAR, "norm1": NORM, "norm2": NORM}
    encoder = at("encoder.layers.0", "encoder.layers.1", self_attn=ATTENTION, **feed)
    decoder = at(
        "decoder.layers.0", "decoder.layers.1",
        self_attn=ATTENTION, multihead_attn=ATTENTION, norm3=NORM, **feed,
    )  # fmt: skip
    check(model, encoder | decoder | at("encoder", "decoder", norm=NORM))


@pytest.mark.parametrize("layers", [1, 2])
def test_transformer_layers_are_blocks_also_without_siblings(layers: int):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    expected = {"self_attn": ATTENTION, "linear1": LINEAR, "linear2": LINEAR, "norm1": NORM,
                "norm2": NORM}  # fmt: skip
    check(layer, at("", **expected))
    check(Bag(layer=layer), at("layer", **expected))
    encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    check(encoder, at(*(f"layers.{i}" for i in range(layers)), **expected))


class GPTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(8)
        self.attn = Bag(c_attn=nn.Linear(8, 24), c_proj=nn.Linear(8, 8))
        self.ln_2 = nn.LayerNorm(8)
        self.mlp = Bag(c_fc=nn.Linear(8, 32), c_proj=nn.Linear(32, 8))


GPT_BLOCK = at(
    "", ln_1=NORM, ln_2=NORM, attn__c_attn={"weight": "fused_qkv", "bias": "bias"},
    attn__c_proj=LINEAR, mlp__c_fc=LINEAR, mlp__c_proj=LINEAR,
)  # fmt: skip
GPT = {
    "transformer.wte.weight": "embedding",
    "transformer.wpe.weight": "embedding",
    "transformer.ln_f.weight": "norm",
    "transformer.ln_f.bias": "norm",
    "lm_head.weight": "head",
}


def gpt(layers: int = 2, tied: bool = False, head_first: bool = False) -> nn.Module:
    model = Bag(lm_head=nn.Linear(8, 11, bias=False)) if head_first else Bag()
    model.transformer = nn.ModuleDict(
        {
            "wte": nn.Embedding(11, 8),
            "wpe": nn.Embedding(6, 8),
            "h": nn.ModuleList([GPTBlock() for _ in range(layers)]),
            "ln_f": nn.LayerNorm(8),
        }
    )
    if not head_first:
        model.lm_head = nn.Linear(8, 11, bias=False)
    if tied:
        model.lm_head.weight = model.transformer["wte"].weight  # type: ignore[union-attr]
    return model


def gpt_blocks(layers: int = 2) -> Expected:
    return at(*(f"transformer.h.{i}" for i in range(layers)), **{"": GPT_BLOCK})


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_gpt(layers: int, head_first: bool):
    roles = check(gpt(layers, head_first=head_first), GPT | gpt_blocks(layers))
    assert roles["lm_head.weight"].reason == "linear layer named lm_head"


def test_tied_head_names_both():
    tied = {n: r for n, r in GPT.items() if n != "lm_head.weight"}
    tied["transformer.wte.weight"] = "head"
    roles = check(gpt(tied=True), tied | gpt_blocks())
    reason = roles["transformer.wte.weight"].reason
    assert "transformer.wte" in reason
    assert "lm_head" in reason


def test_tied_head_of_any_name_leaves_the_last_linear_alone():
    """As in BERT: the transform is the last linear but one, and the last is tied."""
    embedding, decoder = nn.Embedding(11, 8), nn.Linear(8, 11)
    decoder.weight = embedding.weight
    model = Bag(words=embedding, decoder=decoder, transform=nn.Linear(8, 8))
    expected = {"words.weight": "head", "decoder.bias": "bias"} | at("", transform=LINEAR)
    check(model, expected)


def test_gpt_without_its_head():
    backbone = gpt().transformer
    named = {n.removeprefix("transformer."): r for n, r in (GPT | gpt_blocks()).items()}
    check(backbone, {n: r for n, r in named.items() if n != "lm_head.weight"})  # type: ignore[arg-type]


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = param(8)


class LlamaBlock(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn = Bag(**{f"{n}_proj": nn.Linear(8, 8, bias=False) for n in "qkvo"})
        self.mlp = mlp
        self.input_layernorm = RMSNorm()
        self.post_attention_layernorm = RMSNorm()


def llama(mlps: list[nn.Module]) -> nn.Module:
    layers = nn.ModuleList([LlamaBlock(mlp) for mlp in mlps])
    body = Bag(embed_tokens=nn.Embedding(11, 8), layers=layers, norm=RMSNorm())
    return Bag(model=body, lm_head=nn.Linear(8, 11, bias=False))


def swiglu() -> nn.Module:
    return Bag(
        gate_proj=nn.Linear(8, 12, bias=False),
        up_proj=nn.Linear(8, 12, bias=False),
        down_proj=nn.Linear(12, 8, bias=False),
    )


LLAMA_BLOCK = {
    "self_attn.q_proj.weight": "matrix",
    "self_attn.k_proj.weight": "matrix",
    "self_attn.v_proj.weight": "matrix",
    "self_attn.o_proj.weight": "matrix",
    "input_layernorm.weight": "norm",
    "post_attention_layernorm.weight": "norm",
}
SWIGLU = {"gate_proj.weight": "matrix", "up_proj.weight": "matrix", "down_proj.weight": "matrix"}
LLAMA = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "norm",
    "lm_head.weight": "head",
}
LLAMA_PATHS = ("model.layers.0", "model.layers.1")


def test_llama():
    blocks = at(*LLAMA_PATHS, **{"": LLAMA_BLOCK, "mlp": SWIGLU})
    check(llama([swiglu(), swiglu()]), LLAMA | blocks)


def test_experts_in_one_parameter():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj = param(4, 8, 24), param(4, 12, 8)
            self.gate_up_proj_bias = param(4, 24)

    def moe() -> nn.Module:
        return Bag(router=nn.Linear(8, 4, bias=False), experts=Experts())

    mlp = {
        "router.weight": "router",
        "experts.gate_up_proj": "experts",
        "experts.down_proj": "experts",
        "experts.gate_up_proj_bias": "bias",
    }
    check(llama([moe(), moe()]), LLAMA | at(*LLAMA_PATHS, **{"": LLAMA_BLOCK, "mlp": mlp}))


def test_experts_in_a_list():
    def moe() -> nn.Module:
        experts = nn.ModuleList([swiglu() for _ in range(3)])
        return Bag(gate=nn.Linear(8, 3, bias=False), experts=experts)

    mlp = {"gate.weight": "router"} | at("experts.0", "experts.1", "experts.2", **{"": SWIGLU})
    expected = LLAMA | at(*LLAMA_PATHS, **{"": LLAMA_BLOCK, "mlp": mlp})
    roles = check(llama([moe(), moe()]), expected)
    assert "expert" in roles["model.layers.1.mlp.experts.2.up_proj.weight"].reason
    reason = roles["model.layers.1.mlp.gate.weight"].reason
    assert reason == "named gate, with one row per expert"


def test_experts_by_any_name():
    class MoEMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.router = param(3, 4, 5), param(3, 4)

    check(MoEMLP(), {"w1": "experts", "router": "router"})
    model = Bag(expert_weights=param(3, 4, 5), experts=nn.ParameterDict({"up": param(3, 4, 5)}))
    check(model, {"expert_weights": "experts", "experts.up": "experts"})

    class MoE(Bag):
        pass

    model = MoE(weights=nn.ParameterDict({"up": param(3, 4, 5), "gate": param(3, 4)}))
    check(model, {"weights.up": "experts", "weights.gate": "router"})


def test_experts_and_routers_at_the_top_are_no_heads():
    experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
    model = Bag(up=nn.Linear(4, 4), experts=experts, router=nn.Linear(4, 2))
    router = {"weight": "router", "bias": "bias"}
    check(model, at("", up=HEAD, experts__0=LINEAR, experts__1=LINEAR, router=router))


@pytest.mark.parametrize(
    "name", ["qkv", "qkv_proj", "Wqkv", "to_qkv", "c_attn", "query_key_value", "attn_qkv"]
)
def test_fused_projections(name: str):
    class Conv1D(nn.Module):
        """As in transformers: the weight is (in, out)."""

        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.weight, self.bias = param(inputs, outputs), param(outputs)

    fused = {"weight": "fused_qkv", "bias": "bias"}
    body = Bag(lm_head=nn.Linear(4, 4), **{name: nn.Linear(4, 12)})
    check(body, at("", lm_head=HEAD, **{name: fused}))
    check(Bag(lm_head=Conv1D(4, 4), **{name: Conv1D(4, 12)}), at("", lm_head=HEAD, **{name: fused}))
    # A layer inside of what is named so, with a norm beside it, for example.
    inner = Bag(lm_head=nn.Linear(4, 4), **{name: Bag(linear=nn.Linear(4, 12))})
    check(inner, at("", lm_head=HEAD, **{f"{name}__linear": fused}))
    # What is not longer along its outputs cannot be three projections.
    for layer in (nn.Linear(12, 4), nn.Linear(4, 4), Conv1D(12, 4)):
        check(Bag(lm_head=nn.Linear(4, 4), **{name: layer}), at("", lm_head=HEAD, **{name: LINEAR}))


def test_in_proj_is_fused_in_attention_only():
    class SelfAttention(Bag):
        pass

    def mixer(cls: type[Bag]) -> Bag:
        return cls(in_proj=nn.Linear(4, 12), out_proj=nn.Linear(4, 4))

    model = nn.ModuleList([mixer(SelfAttention), mixer(Bag)])
    fused = {"weight": "fused_qkv", "bias": "bias"}
    expected = at("", **{"0__in_proj": fused, "1__in_proj": LINEAR})
    check(model, expected | at("0", "1", out_proj=LINEAR))


def test_multihead_attention_alone():
    model = nn.MultiheadAttention(4, 2, kdim=1, vdim=3, add_bias_kv=True)
    matrices = {"q_proj_weight": "matrix", "k_proj_weight": "matrix", "v_proj_weight": "matrix"}
    biases = {"in_proj_bias": "bias", "bias_k": "bias", "bias_v": "bias"}
    check(model, matrices | biases | at("", out_proj=LINEAR))
    check(nn.MultiheadAttention(4, 2), ATTENTION)


# --- vision --------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A block of torchvision's ResNet: basic for kernels (3, 3), a bottleneck for (1, 3, 1)."""

    def __init__(self, channels: list[int], kernels: tuple[int, ...], squeeze: bool) -> None:
        super().__init__()
        for i, kernel in enumerate(kernels):
            conv = nn.Conv2d(channels[i], channels[i + 1], kernel, bias=False)
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(channels[i + 1]))
        last = channels[-1]
        if squeeze:
            self.se = nn.Sequential(nn.Linear(last, 2), nn.ReLU(), nn.Linear(2, last))
        if channels[0] != last:
            conv = nn.Conv2d(channels[0], last, 1, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(last))


def resnet(
    blocks: tuple[int, ...],
    kernels: tuple[int, ...] = (3, 3),
    squeeze: bool = False,
    fc: nn.Module | None = None,
) -> nn.Module:
    """A ResNet as torchvision registers it; `blocks` per stage."""
    model = Bag(conv1=nn.Conv2d(3, 2, 7, bias=False), bn1=nn.BatchNorm2d(2))
    channels = 2
    for i, count in enumerate(blocks):
        layers = []
        for _ in range(count):
            width, wide = 2**i, 2 ** (i + 2)
            sizes = [channels, *[width] * (len(kernels) - 1), wide]
            layers.append(Residual(sizes, kernels, squeeze))
            channels = wide
        model.add_module(f"layer{i + 1}", nn.Sequential(*layers))
    if fc is not None:
        model.fc = fc
    return model


def resnet_roles(blocks: list[str], downsampled: list[str], convs: int) -> Expected:
    expected = at("", conv1=CONV, bn1=NORM)
    for i in range(1, convs + 1):
        expected |= at(*blocks, **{f"conv{i}": CONV, f"bn{i}": NORM})
    return expected | at(*downsampled, downsample__0=CONV, downsample__1=NORM)


FIRST = ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]
RESNET18 = resnet_roles(
    [f"{stage[:-1]}{i}" for stage in FIRST for i in range(2)], downsampled=FIRST, convs=2
)
RESNET50 = resnet_roles(
    [f"layer1.{i}" for i in range(3)] + [f"layer2.{i}" for i in range(4)]
    + [f"layer3.{i}" for i in range(6)] + [f"layer4.{i}" for i in range(3)],
    downsampled=FIRST, convs=3,
)  # fmt: skip


def test_resnet18():
    check(resnet((2, 2, 2, 2), fc=nn.Linear(32, 5)), RESNET18 | at("", fc=HEAD))
    check(resnet((2, 2, 2, 2)), RESNET18)
    check(resnet((2, 2, 2, 2), fc=nn.Identity()), RESNET18)


def test_resnet50():
    model = resnet((3, 4, 6, 3), kernels=(1, 3, 1), fc=nn.Linear(32, 5))
    check(model, RESNET50 | at("", fc=HEAD))
    check(resnet((3, 4, 6, 3), kernels=(1, 3, 1)), RESNET50)


@pytest.mark.parametrize("fc", [None, nn.Linear(32, 5)])
@pytest.mark.parametrize("count", [1, 2])
def test_linears_in_blocks_are_no_heads(count: int, fc: nn.Module | None):
    """Squeeze-and-excitation; with a block per stage the stages are the repeated blocks."""
    blocks = [f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in range(count)]
    expected = resnet_roles(blocks, FIRST, convs=2)
    expected |= at(*blocks, se__0=LINEAR, se__2=LINEAR)
    expected |= at("", fc=HEAD) if fc else {}
    check(resnet((count,) * 4, squeeze=True, fc=fc), expected)


def vit(**head: nn.Module) -> nn.Module:
    """As torchvision writes it."""
    layers = nn.Sequential()
    for i in range(2):
        mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        block = Bag(ln_1=nn.LayerNorm(4), self_attention=nn.MultiheadAttention(4, 2),
                    ls=nn.Parameter(torch.ones(4)), mlp=mlp)  # fmt: skip
        layers.add_module(f"encoder_layer_{i}", block)
    encoder = Bag(pos_embedding=param(1, 5, 4), layers=layers, ln=nn.LayerNorm(4))
    return Bag(class_token=param(1, 1, 4), conv_proj=nn.Conv2d(3, 4, 2), encoder=encoder, **head)


VIT = {
    "class_token": "embedding",
    "conv_proj.weight": "conv",
    "conv_proj.bias": "bias",
    "encoder.pos_embedding": "embedding",
    "encoder.ln.weight": "norm",
    "encoder.ln.bias": "norm",
} | at(
    "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1",
    ln_1=NORM, self_attention=ATTENTION, mlp__0=LINEAR, mlp__2=LINEAR, **{"": {"ls": "other"}},
)  # fmt: skip


def test_vit():
    heads = nn.Sequential()
    heads.add_module("pre_logits", nn.Linear(4, 4))
    heads.add_module("head", nn.Linear(4, 3))
    roles = check(vit(heads=heads), VIT | at("", heads__pre_logits=LINEAR, heads__head=HEAD))
    name = "encoder.layers.encoder_layer_0.ls"
    assert f"match '{name}'" in roles[name].reason  # how to choose another role
    check(vit(), VIT)


def test_backbone_whose_head_was_taken_off():
    """As in timm: the linear layer that is left is not promoted."""
    check(vit(pre=nn.Linear(4, 4), head=nn.Identity()), VIT | at("", pre=LINEAR))
    check(vit(pre=nn.Linear(4, 4), head=nn.Conv2d(4, 3, 1)),
          VIT | at("", pre=LINEAR, head=HEAD))  # fmt: skip


# --- heads ---------------------------------------------------------------------------------------


def mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for n, m in pairwise(sizes) for layer in (nn.Linear(n, m), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def test_mlps():
    check(nn.Linear(3, 2), HEAD)
    check(mlp(3, 4, 2), {"0.weight": "matrix", "0.bias": "bias", "2.weight": "head",
                         "2.bias": "bias"})  # fmt: skip
    check(mlp(4, 4, 4, 4), at("0", "2", **{"": LINEAR}) | at("4", **{"": HEAD}))
    listed = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
    check(listed, at("0", "1", **{"": LINEAR}) | at("2", **{"": HEAD}))
    model = Bag(fc1=nn.Linear(3, 4), fc2=nn.Linear(4, 4), fc3=nn.Linear(4, 2))
    check(model, at("", fc1=LINEAR, fc2=LINEAR, fc3=HEAD))


def test_autoencoder():
    """An encoder and a decoder are alike, but not repeated blocks."""
    halves = at("", encoder__0=LINEAR, encoder__2=LINEAR, decoder__0=LINEAR, decoder__2=HEAD)
    check(Bag(encoder=mlp(6, 4, 2), decoder=mlp(2, 4, 6)), halves)
    down, up = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 3)
    filters = {"weight": "conv", "bias": "bias"}
    check(Bag(encoder=down, decoder=up), at("", encoder=filters, decoder=filters))


def test_backbone_and_head_in_a_sequential():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), nn.Flatten(), mlp(8, 4, 3))
    expected = {"0.0.weight": "conv", "0.0.bias": "bias"}
    check(model, expected | at("2", **{"0": LINEAR, "2": HEAD}))


def test_numbered_blocks_are_repeated():
    class Block(Bag):
        pass

    def block() -> Block:
        return Block(fc1=nn.Linear(4, 4), fc2=nn.Linear(4, 4))

    inside = at("block1", "block2", fc1=LINEAR, fc2=LINEAR)
    check(Bag(block1=block(), block2=block()), inside)
    first = Bag(out=nn.Linear(4, 2), block1=block(), block2=block())
    check(first, inside | at("", out=HEAD))  # registered first, and last in the forward pass
    stages = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])
    check(stages, at("0.0", "1.0", **{"": LINEAR}))
    expected = at("0.0", "1.0", **{"": LINEAR}) | at("2", **{"": HEAD})
    check(nn.Sequential(*stages, nn.Linear(4, 4)), expected)


def test_layers_of_an_mlp_are_no_blocks():
    layers = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 2))]
    check(nn.ModuleList(layers), at("0.0", **{"": LINEAR}) | at("1.0", **{"": HEAD}))
    normed = [parametrizations.spectral_norm(nn.Linear(4, 4)) for _ in range(2)]
    check(nn.ModuleList(normed), {
        "0.bias": "bias", "0.parametrizations.weight.original": "matrix",
        "1.bias": "bias", "1.parametrizations.weight.original": "head",
    })  # fmt: skip


def test_blocks_count_only_if_they_hold_parameters():
    class Shortcut(Bag):
        pass

    model = nn.Sequential(Shortcut(fn=nn.ReLU()), Shortcut(fn=nn.Linear(3, 2)))
    check(model, at("1", fn=HEAD))


@pytest.mark.parametrize(
    "name",
    ["lm_head", "head", "classifier", "output_projection", "to_logits", "unembed", "score",
     "embed_out", "mlm_head", "proj_out", "head_dist", "qa_outputs", "head2", "cls_classifier"],
)  # fmt: skip
def test_named_heads(name: str):
    last = {"last": nn.Linear(4, 4)}
    check(Bag(**{name: nn.Linear(4, 2)}, **last), at("", **{name: HEAD}, last=LINEAR))
    # The last layer of a head is the head.
    check(Bag(**{name: mlp(4, 4, 2)}, **last),
          at("", **{f"{name}__0": LINEAR, f"{name}__2": HEAD}, last=LINEAR))  # fmt: skip


def test_transform_named_head():
    """As in ModernBERT: `head` ends in a norm, and the output layer comes behind it."""

    def model() -> Any:
        head = Bag(dense=nn.Linear(8, 8), norm=nn.LayerNorm(8))
        return Bag(words=nn.Embedding(11, 8), head=head, decoder=nn.Linear(8, 11))

    transform = at("head", dense=LINEAR, norm=NORM)
    check(model(), {"words.weight": "embedding"} | transform | at("", decoder=HEAD))
    tied = model()
    tied.decoder.weight = tied.words.weight
    check(tied, {"words.weight": "head", "decoder.bias": "bias"} | transform)


def test_what_comes_before_a_head_is_none():
    """As in DistilBERT."""
    model = Bag(pre_classifier=nn.Linear(4, 4), classifier=nn.Linear(4, 2))
    check(model, at("", pre_classifier=LINEAR, classifier=HEAD))


def test_several_heads():
    both = Bag(policy_head=mlp(4, 4, 3), value_head=mlp(4, 4, 1))
    expected = at("policy_head", "value_head", **{"0": LINEAR, "2": HEAD})
    check(both, expected)
    for heads in (nn.ModuleList([mlp(4, 4, 2), mlp(4, 4, 3)]),
                  nn.ModuleDict({"0": mlp(4, 4, 2), "1": mlp(4, 4, 3)})):  # fmt: skip
        check(Bag(heads=heads), at("heads.0", "heads.1", **{"0": LINEAR, "2": HEAD}))
    plain = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 3)])
    check(Bag(heads=plain), at("heads.0", "heads.1", **{"": HEAD}))


def test_names_of_heads_in_blocks_say_nothing():
    class Attention(nn.Module):
        """As in a well-known tutorial: a list of heads that are not output heads."""

        def __init__(self) -> None:
            super().__init__()
            heads = [Bag(key=nn.Linear(4, 2), query=nn.Linear(4, 2)) for _ in range(2)]
            self.heads, self.proj = nn.ModuleList(heads), nn.Linear(4, 4)

    inside = at("heads.0", "heads.1", key=LINEAR, query=LINEAR) | at("", proj=LINEAR)
    blocks = nn.Sequential(Bag(sa=Attention()), Bag(sa=Attention()))
    check(Bag(blocks=blocks, out=nn.Linear(4, 9)),
          at("blocks.0.sa", "blocks.1.sa", **{"": inside}) | at("", out=HEAD))  # fmt: skip
    single = Bag(blocks=nn.Sequential(Bag(sa=Attention())), out=nn.Linear(4, 9))
    check(single, at("blocks.0.sa", **{"": inside}) | at("", out=HEAD))
    scores = [Bag(score=nn.Linear(4, 4), fc=nn.Linear(4, 4)) for _ in range(2)]
    inside = at("blocks.0", "blocks.1", score=LINEAR, fc=LINEAR)
    check(Bag(blocks=nn.ModuleList(scores), out=nn.Linear(4, 9)), inside | at("", out=HEAD))
    bare = [Bag(score=param(4, 3), fc=nn.Linear(3, 4)) for _ in range(2)]
    inside = at("blocks.0", "blocks.1", fc=LINEAR, **{"": {"score": "matrix"}})
    check(Bag(blocks=nn.ModuleList(bare), out=nn.Linear(4, 9)), inside | at("", out=HEAD))


def test_attention_has_no_head():
    attention = Bag(key=nn.Linear(4, 4), out_proj=nn.Linear(4, 4))
    model = Bag(words=nn.Embedding(9, 4), attn=attention)
    check(model, {"words.weight": "embedding"} | at("attn", key=LINEAR, out_proj=LINEAR))


@pytest.mark.parametrize(
    "name", ["pooler", "visual_projection", "time_mlp", "patch_embed", "input_layer", "fc_in"]
)
def test_what_leads_elsewhere_is_no_head(name: str):
    aside = Bag(dense=nn.Linear(4, 4))
    check(Bag(body=nn.Conv2d(3, 4, 3, bias=False), **{name: aside}),
          at("", body=CONV, **{f"{name}__dense": LINEAR}))  # fmt: skip
    check(Bag(out_proj=nn.Linear(4, 4), **{name: aside}),
          at("", out_proj=HEAD, **{f"{name}__dense": LINEAR}))  # fmt: skip


def test_weight_shared_by_linears_is_a_head_if_one_is():
    first, last = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    last.weight = first.weight
    model = Bag(first=first, middle=nn.Linear(4, 4), head=last)
    check(model, at("", first=HEAD, middle=LINEAR))


def test_module_used_twice_counts_once():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 2))
    check(model, at("0", **{"": LINEAR}) | at("4", **{"": HEAD}))


def test_parameter_with_two_names():
    weight = param(4, 3)
    check(Bag(w=weight, lm_head=weight), {"w": "head"})


def test_cycles():
    """A module may hold its parent, as `named_modules` allows."""
    child = Bag(fc=nn.Linear(4, 2))
    model = Bag(child=child)
    child.parent = model
    check(model, at("child", fc=HEAD))


# --- other modules -------------------------------------------------------------------------------


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
        """Known by its base class."""

    class FrozenNorm2d(nn.Module):
        """Known by its name, also with several axes."""

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


# --- parametrizations, wrappers, devices ---------------------------------------------------------


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
    """Not around the model, not around a block, not around a layer."""
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
        "scale        scalar   other  a vector or scalar, in Bag; to change it, match 'scale'",
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
