"""The role of every parameter of `transformers` models; skipped without the package."""

from __future__ import annotations

from typing import Any

import pytest

from structprecond.roles import infer_roles
from tests.roles.architectures.table import package

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

transformers: Any = package("transformers")

Expected = dict[str, str]
SMALL = {
    "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12
}  # fmt: skip
TOKENS = {"vocab_size": 11, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(model: str, config: str, **settings: Any) -> Any:
    return getattr(transformers, model)(getattr(transformers, config)(**settings))


def check(model: Any, expected: Expected) -> None:
    """Compare roles with the expected ones, for each parameter in the model's order."""
    roles = infer_roles(model)
    assert {name: role.role for name, role in roles.items()} == expected
    assert list(roles) == [name for name, _ in model.named_parameters()]


def layers(prefix: str, layer: Expected) -> Expected:
    """Spell out two layers."""
    return {f"{prefix}.{i}.{name}": role for i in range(2) for name, role in layer.items()}


def under(prefix: str, expected: Expected) -> Expected:
    return {f"{prefix}.{name}": role for name, role in expected.items()}


# --- GPT-2, Llama and Mixtral --------------------------------------------------------------------

GPT2 = {
    "wpe.weight": "embedding",
    "ln_f.weight": "norm",
    "ln_f.bias": "norm",
} | layers("h", {
    "ln_1.weight": "norm",
    "ln_1.bias": "norm",
    "attn.c_attn.weight": "fused_qkv",
    "attn.c_attn.bias": "bias",
    "attn.c_proj.weight": "matrix",
    "attn.c_proj.bias": "bias",
    "ln_2.weight": "norm",
    "ln_2.bias": "norm",
    "mlp.c_fc.weight": "matrix",
    "mlp.c_fc.bias": "bias",
    "mlp.c_proj.weight": "matrix",
    "mlp.c_proj.bias": "bias",
})  # fmt: skip
GPT2_SMALL = {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 6, **TOKENS}


def test_gpt2():
    body = under("transformer", GPT2)
    tied = build("GPT2LMHeadModel", "GPT2Config", **GPT2_SMALL)
    check(tied, body | {"transformer.wte.weight": "head"})
    reason = infer_roles(tied)["transformer.wte.weight"].reason
    assert "transformer.wte" in reason
    assert "lm_head" in reason
    untied = build("GPT2LMHeadModel", "GPT2Config", **GPT2_SMALL, tie_word_embeddings=False)
    check(untied, body | {"transformer.wte.weight": "embedding", "lm_head.weight": "head"})
    check(build("GPT2Model", "GPT2Config", **GPT2_SMALL), GPT2 | {"wte.weight": "embedding"})


DECODER_LAYER = {
    "self_attn.q_proj.weight": "matrix",
    "self_attn.k_proj.weight": "matrix",
    "self_attn.v_proj.weight": "matrix",
    "self_attn.o_proj.weight": "matrix",
    "input_layernorm.weight": "norm",
    "post_attention_layernorm.weight": "norm",
}
SWIGLU = {
    "mlp.gate_proj.weight": "matrix",
    "mlp.up_proj.weight": "matrix",
    "mlp.down_proj.weight": "matrix",
}


def decoder(embedding: str, mlp: Expected) -> Expected:
    ends = {"model.embed_tokens.weight": embedding, "model.norm.weight": "norm"}
    return ends | layers("model.layers", DECODER_LAYER | mlp)


def test_llama():
    settings = {"num_key_value_heads": 1, **SMALL, **TOKENS}
    model = build("LlamaForCausalLM", "LlamaConfig", **settings)
    check(model, decoder("embedding", SWIGLU) | {"lm_head.weight": "head"})
    model = build("LlamaForCausalLM", "LlamaConfig", **settings, tie_word_embeddings=True)
    check(model, decoder("head", SWIGLU))


def test_mixtral():
    model = build("MixtralForCausalLM", "MixtralConfig", num_key_value_heads=1, num_local_experts=2,
                  **SMALL, **TOKENS)  # fmt: skip
    if hasattr(model.model.layers[0], "mlp"):  # since 5.0
        moe = {
            "mlp.gate.weight": "router",
            "mlp.experts.gate_up_proj": "experts",
            "mlp.experts.down_proj": "experts",
        }
    else:
        moe = {"block_sparse_moe.gate.weight": "router"} | layers(
            "block_sparse_moe.experts",
            {"w1.weight": "matrix", "w2.weight": "matrix", "w3.weight": "matrix"},
        )
    check(model, decoder("embedding", moe) | {"lm_head.weight": "head"})


# --- BERT and ViT --------------------------------------------------------------------------------

BERT_LAYERS = layers("encoder.layer", {
    "attention.self.query.weight": "matrix",
    "attention.self.query.bias": "bias",
    "attention.self.key.weight": "matrix",
    "attention.self.key.bias": "bias",
    "attention.self.value.weight": "matrix",
    "attention.self.value.bias": "bias",
    "attention.output.dense.weight": "matrix",
    "attention.output.dense.bias": "bias",
    "attention.output.LayerNorm.weight": "norm",
    "attention.output.LayerNorm.bias": "norm",
    "intermediate.dense.weight": "matrix",
    "intermediate.dense.bias": "bias",
    "output.dense.weight": "matrix",
    "output.dense.bias": "bias",
    "output.LayerNorm.weight": "norm",
    "output.LayerNorm.bias": "norm",
})  # fmt: skip
BERT = BERT_LAYERS | {
    "embeddings.word_embeddings.weight": "embedding",
    "embeddings.position_embeddings.weight": "embedding",
    "embeddings.token_type_embeddings.weight": "embedding",
    "embeddings.LayerNorm.weight": "norm",
    "embeddings.LayerNorm.bias": "norm",
}
POOLER = {"pooler.dense.weight": "matrix", "pooler.dense.bias": "bias"}
MASKED = {
    "cls.predictions.bias": "bias",
    "cls.predictions.transform.dense.weight": "matrix",
    "cls.predictions.transform.dense.bias": "bias",
    "cls.predictions.transform.LayerNorm.weight": "norm",
    "cls.predictions.transform.LayerNorm.bias": "norm",
}
CLASSIFIER = {"classifier.weight": "head", "classifier.bias": "bias"}


def bert(model: str, **settings: Any) -> Any:
    settings = {"max_position_embeddings": 6, **SMALL, **TOKENS, **settings}
    return build(model, "BertConfig", **settings)


def test_bert():
    check(bert("BertModel"), BERT | POOLER)


def test_bert_masked():
    tied = under("bert", BERT) | {"bert.embeddings.word_embeddings.weight": "head"} | MASKED
    check(bert("BertForMaskedLM"), tied)
    model = bert("BertForMaskedLM", tie_word_embeddings=False)
    expected = under("bert", BERT) | MASKED | {"cls.predictions.decoder.weight": "head"}
    if "cls.predictions.decoder.bias" in dict(model.named_parameters()):  # it may stay tied
        expected["cls.predictions.decoder.bias"] = "bias"
    check(model, expected)


def test_modern_bert():
    """Its `head` is a transform, and its head is the decoder."""
    settings = {**SMALL, **TOKENS, "cls_token_id": 1, "sep_token_id": 2}
    for tied in (True, False):
        model = build("ModernBertForMaskedLM", "ModernBertConfig", **settings,
                      tie_word_embeddings=tied)  # fmt: skip
        found = [name for name, role in infer_roles(model).items() if role.role == "head"]
        embedding = "model.embeddings.tok_embeddings.weight"
        assert found == [embedding if tied else "decoder.weight"]


def test_bert_classifier():
    check(bert("BertForSequenceClassification"), under("bert", BERT | POOLER) | CLASSIFIER)


def test_vit():
    ends = {
        "embeddings.cls_token": "embedding",
        "embeddings.position_embeddings": "embedding",
        "embeddings.patch_embeddings.projection.weight": "conv",
        "embeddings.patch_embeddings.projection.bias": "bias",
        "layernorm.weight": "norm",
        "layernorm.bias": "norm",
    }
    linears = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj",
               "mlp.fc1", "mlp.fc2"]  # fmt: skip
    path = "layers"
    settings = {"image_size": 4, "patch_size": 2, **SMALL}
    model = build("ViTModel", "ViTConfig", **settings)
    if not hasattr(model, "layers"):  # before 5.0
        linears = ["attention.attention.query", "attention.attention.key",
                   "attention.attention.value", "attention.output.dense", "intermediate.dense",
                   "output.dense"]  # fmt: skip
        path = "encoder.layer"
    layer = {f"{name}.weight": "matrix" for name in linears}
    layer |= {f"{name}.bias": "bias" for name in linears}
    for name in ("layernorm_before", "layernorm_after"):
        layer |= {f"{name}.weight": "norm", f"{name}.bias": "norm"}
    vit = ends | layers(path, layer)
    check(model, vit | POOLER)
    check(build("ViTForImageClassification", "ViTConfig", **settings),
          under("vit", vit) | CLASSIFIER)  # fmt: skip
