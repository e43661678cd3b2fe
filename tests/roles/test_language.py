"""Language models as people write them."""

from __future__ import annotations

import pytest
from torch import nn

from tests.roles.helpers import (
    ATTENTION,
    GPT,
    HEAD,
    LINEAR,
    NORM,
    Bag,
    at,
    check,
    gpt,
    gpt_blocks,
    param,
)


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
    """As in BERT: the last linear layer is tied, the one before it is a transform."""
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
    # A layer inside a module of this name, for example next to a norm.
    inner = Bag(lm_head=nn.Linear(4, 4), **{name: Bag(linear=nn.Linear(4, 12))})
    check(inner, at("", lm_head=HEAD, **{f"{name}__linear": fused}))
    # A layer without more outputs than inputs cannot be three projections.
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
